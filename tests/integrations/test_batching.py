"""Micro-batching: what is scored together, in which order, and what one bad row costs."""

import asyncio

import pytest

from sarm.integrations.batching import MicroBatcher, RewardError, Worker, score_each

WAIT = 30


class Counting:
    """A scorer whose reward is a row's first id; it can be held."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([row[0] for row in rows])
        if any(row[0] < 0 for row in rows):
            raise ValueError("item 0: negative (1 items in all)")
        return [float("nan") if row[0] == 99 else float(row[0]) for row in rows]


def run(main, score=None, **options):
    """Run `main(batcher, score)` in a loop with a live batcher."""
    score = score or Counting()

    async def go():
        worker = Worker("test")
        batcher = MicroBatcher(score, worker, **options)
        task = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(main(batcher, score), WAIT)
        finally:
            assert not task.done(), task.exception()
            task.cancel()
            worker.stop()

    return asyncio.run(go())


def test_requests_that_wait_together_are_scored_together_in_order():
    async def main(batcher, score):
        got = await asyncio.gather(
            batcher.score([[1], [2]]), batcher.score([[3]]), batcher.score([[4, 4]])
        )
        assert got == [[1, 2], [3], [4]]
        assert score.batches == [[1, 2, 3, 4]]

    run(main)


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_no_longer_than_max_wait():
    async def main(batcher, score):
        assert await batcher.score([[1]] * 4) == [1] * 4  # max_wait is an hour

    run(main, max_wait_s=3600, max_batch_size=4)
    run(main, max_wait_s=3600, max_batch_tokens=4)
    run(main, max_wait_s=0.01)


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"max_batch_size": 2}, [[1, 2], [3, 4], [5]]),
        ({"max_batch_tokens": 6}, [[1, 2, 3], [4, 5]]),
        ({"max_batch_tokens": 1}, [[1], [2], [3], [4], [5]]),
    ],
)
def test_large_requests_span_batches(limits, batches):
    async def main(batcher, score):
        got = await asyncio.gather(
            batcher.score([[1, 0], [2, 0], [3, 0]]), batcher.score([[4, 0], [5, 0]])
        )
        assert got == [[1, 2, 3], [4, 5]]
        assert score.batches == batches
        assert (batcher.waiting_rows, batcher._waiting_tokens) == (0, 0)

    run(main, **limits)


@pytest.mark.parametrize(("bad", "problem"), [(-1, "negative"), (99, "the reward is nan")])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_a_bad_row_fails_its_own_request_alone(bad, problem, size):
    async def main(batcher, score):
        rows = [[i] for i in range(size)]
        *good, failed = await asyncio.gather(
            *(batcher.score([row]) for row in rows),
            batcher.score([[50], [bad], [51]]),
            return_exceptions=True,
        )
        assert good == [[float(i)] for i in range(size)]
        assert isinstance(failed, RewardError)
        assert (failed.index, str(failed)) == (1, problem)

    run(main)


def test_halving_scores_no_row_more_often_than_the_logarithm():
    score = Counting()
    rows = [[i] for i in range(64)]
    rows[13] = [-1]
    outcomes = score_each(score, rows)
    assert isinstance(outcomes.pop(13), ValueError)
    assert outcomes == [float(i) for i in range(64) if i != 13]
    assert max(sum(i in b for b in score.batches) for i in range(64)) <= 7


def test_cancelled_work_is_dropped_and_counted_off():
    async def main(batcher, score):
        kept = asyncio.ensure_future(batcher.score([[1]]))
        gone = asyncio.ensure_future(batcher.score([[2], [3]]))
        await asyncio.sleep(0)
        assert (batcher.waiting_rows, batcher._waiting_tokens) == (3, 3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert (batcher.waiting_rows, batcher._waiting_tokens) == (1, 1)
        assert await kept == [1]
        assert score.batches == [[1]]

    run(main, max_wait_s=0.05)


def test_a_call_of_its_own_keeps_its_place_in_the_queue():
    async def main(batcher, score):
        def call():
            assert score.batches == [[1]]
            return "done"

        got = await asyncio.gather(batcher.score([[1]]), batcher.alone(call), batcher.score([[2]]))
        assert got == [[1], "done", [2]]
        with pytest.raises(ZeroDivisionError):
            await batcher.alone(lambda: 1 / 0)
        assert await batcher.score([[3]]) == [3]

    run(main)


def test_every_batch_is_observed():
    seen = []

    async def main(batcher, score):
        await batcher.score([[1, 1], [2]])

    run(main, observe=lambda rows, tokens, seconds: seen.append((rows, tokens, seconds >= 0)))
    assert seen == [(2, 3, True)]
