"""Dynamic micro-batching: sequences of all connections are scored together, by one thread.

OpenRLHF and verl send one sample a request. Scored one by one they would waste the machine, so
whatever has arrived while the scorer was busy becomes its next batch. All state lives in the event
loop's thread; only `Worker` crosses into another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sarm.errors import first_line

#: Tokens that are enough for a batch: more gains little, and delays the first answer.
TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 65536}

Rows = Sequence[Sequence[int]]


class RewardError(Exception):
    """Row `index` of a request has no finite reward."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index


class Worker:
    """One daemon thread that runs calls in the order they came; `run` is awaitable.

    A daemon, because an executor's thread would keep a killed process alive until the call ends.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def run(self, call: Callable, *args) -> asyncio.Future:
        """A future of call(*args); cancelled before its turn, the call is never made."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._calls.put((loop, future, call, args))
        return future

    def stop(self) -> None:
        """End the thread after the calls that were made."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            loop, future, call, args = item
            if future.cancelled():
                continue
            result = error = None
            try:
                result = call(*args)
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_settle, future, result, error)
            del item, future, call, args, result, error  # nothing lives on while waiting


def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled: nobody waits any more
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def score_each(score: Callable[[Rows], Sequence[float]], rows: Rows) -> list[float | Exception]:
    """A reward or an error for every row.

    Where `score` fails, its rows are halved until those that fail stand alone: one bad row, and an
    out-of-memory error, cost their neighbours a second pass and not their answer.
    """
    try:
        rewards = list(score(rows))
    except Exception as error:
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2
        return score_each(score, rows[:half]) + score_each(score, rows[half:])
    return [r if math.isfinite(r) else ArithmeticError(f"the reward is {r}") for r in rewards]


@dataclass(eq=False)
class _Job:
    """One request: rows to score, or a call that wants the scorer for itself."""

    rows: Rows
    future: asyncio.Future
    arrived: float
    call: Callable[[], Any] | None = None
    taken: int = 0
    rewards: list[float] = field(default_factory=list)


class MicroBatcher:
    """Collects rows of many requests and has them scored in batches, in order of arrival.

    A batch is taken when the scorer is free and the oldest request has waited `max_wait_s`, or
    `max_batch_tokens` or `max_batch_size` are reached. A request may span batches. Cancelling
    `score` drops what has not been taken yet.

    Args:
        score: called in `worker` with rows; returns their rewards.
        observe: called after every batch with its rows, tokens and seconds.
    """

    def __init__(
        self,
        score: Callable[[Rows], Sequence[float]],
        worker: Worker,
        *,
        max_wait_s: float = 0.01,
        max_batch_tokens: int = TOKENS_PER_BATCH["cpu"],
        max_batch_size: int = 512,
        observe: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        self._score, self._worker, self._observe = score, worker, observe
        self._max_wait_s = max_wait_s
        self._max_tokens, self._max_rows = max_batch_tokens, max_batch_size
        self._jobs: deque[_Job] = deque()
        self._waiting_tokens = 0
        self._changed = asyncio.Event()
        self.waiting_rows = 0

    async def score(self, rows: Rows) -> list[float]:
        """Rewards of the rows.

        Raises:
            RewardError: names the first row without a finite reward.
        """
        return await self._submit(rows, None) if rows else []

    async def alone(self, call: Callable[[], Any]) -> Any:
        """The result of a call that runs in the scoring thread, between batches, in its turn."""
        return await self._submit((), call)

    async def _submit(self, rows: Rows, call: Callable[[], Any] | None) -> Any:
        loop = asyncio.get_running_loop()
        job = _Job(rows, loop.create_future(), loop.time(), call)
        self._jobs.append(job)
        self._count(job, +1)
        self._changed.set()
        try:
            return await job.future
        finally:
            if job in self._jobs:  # cancelled, or failed before its last row was taken
                self._jobs.remove(job)
                self._count(job, -1)

    def _count(self, job: _Job, sign: int) -> None:
        left = job.rows[job.taken :]
        self.waiting_rows += sign * len(left)
        self._waiting_tokens += sign * sum(map(len, left))

    async def run(self) -> None:
        """Score until cancelled; then, or if this loop has a bug, nobody is left waiting."""
        batch: list[tuple[_Job, Rows]] = []
        try:
            while True:
                await self._enough()
                batch = self._take()
                if batch:
                    await self._score_batch(batch)
        finally:
            for job in [*self._jobs, *(job for job, _ in batch)]:
                _settle(job.future, None, RuntimeError("the scorer has stopped"))

    async def _enough(self) -> None:
        """Return when a batch should be taken."""
        while not self._jobs:
            await self._change(None)
        due = self._jobs[0].arrived + self._max_wait_s
        while (
            self._jobs
            and self._jobs[0].call is None
            and self._waiting_tokens < self._max_tokens
            and self.waiting_rows < self._max_rows
            and (left := due - asyncio.get_running_loop().time()) > 0
        ):
            await self._change(left)

    async def _change(self, timeout: float | None) -> None:
        self._changed.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)

    def _take(self) -> list[tuple[_Job, Rows]]:
        """Rows from the front of the queue, at least one, up to the batch's limits."""
        batch: list[tuple[_Job, Rows]] = []
        rows = tokens = 0
        while self._jobs and rows < self._max_rows:
            job = self._jobs[0]
            if job.call is not None:
                if not batch:
                    batch.append((self._jobs.popleft(), ()))
                break
            end = job.taken
            while end < len(job.rows) and rows < self._max_rows:
                if rows and tokens + len(job.rows[end]) > self._max_tokens:
                    break
                tokens += len(job.rows[end])
                rows += 1
                end += 1
            if end == job.taken:
                break
            part = job.rows[job.taken : end]
            self._count(job, -1)
            job.taken = end
            self._count(job, +1)
            batch.append((job, part))
            if end < len(job.rows):
                break
            self._jobs.popleft()
        return batch

    async def _score_batch(self, batch: list[tuple[_Job, Rows]]) -> None:
        call = batch[0][0].call
        if call is not None:
            ((job, _),) = batch
            try:
                _settle(job.future, await self._worker.run(call), None)
            except Exception as error:
                _settle(job.future, None, error)
            return
        rows = [row for _, part in batch for row in part]
        start = time.perf_counter()
        outcomes = await self._worker.run(score_each, self._score, rows)
        self._observe(len(rows), sum(map(len, rows)), time.perf_counter() - start)
        at = 0
        for job, part in batch:
            self._deliver(job, outcomes[at : at + len(part)])
            at += len(part)

    def _deliver(self, job: _Job, outcomes: list[float | Exception]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                _settle(job.future, None, RewardError(len(job.rewards), _problem(outcome)))
                return
            job.rewards.append(outcome)
        if len(job.rewards) == len(job.rows):
            _settle(job.future, job.rewards, None)


def _problem(error: Exception) -> str:
    """What was wrong with a row that was scored alone, without its number in that batch of one."""
    text = first_line(error)
    return text.removeprefix("item 0: ").removesuffix(" (1 items in all)")
