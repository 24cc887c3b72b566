"""Rules of the benchmarks against examples worked out by hand, and the bootstrap."""

import numpy as np
import pytest

from sarm.errors import InputError
from sarm.evaluation.benchmarks import judge_best_of, judge_pair, judge_rm_bench
from sarm.evaluation.metrics import Benchmark, Item, bootstrap, evaluate


def judge(rule, chosen, rejected):
    return rule(np.array(chosen, float), np.array(rejected, float))


@pytest.mark.parametrize(("chosen", "rejected", "value"), [(2, 1, 1), (1, 2, 0), (3, 3, 0.5)])
def test_a_pair(chosen, rejected, value):
    assert judge(judge_pair, [chosen], [rejected]) == {"accuracy": value}


@pytest.mark.parametrize(
    ("rejected", "accuracy", "pairwise"),
    [
        ([1, 2, 3], 1, 1),
        ([1, 2, 6], 0, 2 / 3),
        ([1, 2, 5], 1 / 2, 2.5 / 3),  # two tied at the top
        ([5, 5, 5], 1 / 4, 1 / 2),
        ([6, 6, 1], 0, 1 / 3),
        ([5, 6, 6], 0, 0.5 / 3),  # tied, but not at the top
    ],
)
def test_best_of_four(rejected, accuracy, pairwise):
    got = judge(judge_best_of, [5], rejected)
    assert got == pytest.approx({"accuracy": accuracy, "pairwise": pairwise})


@pytest.mark.parametrize(
    ("chosen", "rejected", "easy", "normal", "hard"),
    [
        ([9, 9, 9], [1, 1, 1], 1, 1, 1),
        ([1, 1, 1], [9, 9, 9], 0, 0, 0),
        ([5, 5, 5], [5, 5, 5], 0, 0, 0),  # a tie is no win
        # a model that likes markdown: style adds 0, 2, 4; quality adds 1
        ([1, 3, 5], [0, 2, 4], 1, 1, 0),
        # and one that dislikes it
        ([5, 3, 1], [4, 2, 0], 0, 1, 1),
        # rows concise, plain, markdown; columns the same:
        # 2 > (0, 2, 5): 1 0 0;   4 > (...): 1 1 0;   3 > (...): 1 1 0
        # hard (0,1) (0,2) (1,2) = 0 0 0;  normal 1 1 0;  easy (1,0) (2,0) (2,1) = 1 1 1
        ([2, 4, 3], [0, 2, 5], 1, 2 / 3, 0),
        # 3 > (4, 2, 1): 0 1 1;   0 > : 0 0 0;   2 > : 0 0 1
        ([3, 0, 2], [4, 2, 1], 0, 1 / 3, 2 / 3),
    ],
)
def test_rm_bench(chosen, rejected, easy, normal, hard):
    got = judge(judge_rm_bench, chosen, rejected)
    mean = (easy + normal + hard) / 3
    expected = {"accuracy": mean, "easy": easy, "normal": normal, "hard": hard}
    assert got == pytest.approx(expected)


# ---- evaluate ------------------------------------------------------------------------------


def benchmark(items, rule=judge_best_of):
    turns = [{"role": "assistant", "content": "x"}]
    made = [Item([turns] * (1 + n), 1, f"f:{i}", f"prompt {i}") for i, n in enumerate(items)]
    return Benchmark("made up", made, rule)


def test_rewards_reach_their_items_in_order():
    result = evaluate(benchmark([3, 1, 2]), [4, 1, 2, 3, 0, 1, 7, 7, 6], truncated=5)
    assert result.estimates["accuracy"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert result.estimates["pairwise"].value == pytest.approx((1 + 0 + 0.75) / 3)
    assert (result.items, result.ties, result.truncated) == (3, 1, 5)


def test_ties_among_rejected_answers_do_not_count_as_ties():
    assert evaluate(benchmark([3]), [4, 1, 1, 1]).ties == 0


@pytest.mark.parametrize("rewards", [[1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_wrong_number_of_rewards_is_refused(rewards):
    with pytest.raises(InputError, match="4 conversations but"):
        evaluate(benchmark([3]), rewards)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(InputError, match="the reward of conversation 2 is"):
        evaluate(benchmark([3]), [1, 2, bad, 4])


# ---- bootstrap -----------------------------------------------------------------------------


def test_the_bootstrap_is_deterministic():
    values, groups = np.random.default_rng(0).random(50), [str(i) for i in range(50)]
    assert bootstrap(values, groups) == bootstrap(values, groups)


def test_blocks_of_resamples_do_not_change_the_result():
    """Memory is bounded by drawing in blocks; 3 blocks here against one by hand."""
    n = 4_000_000 // 7
    values = np.zeros(n)
    values[::2] = 1
    estimate = bootstrap(values, range(n), resamples=20)
    draws = np.random.default_rng(0).integers(0, n, (20, n))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = draw.random(100) < 0.7
        estimate = bootstrap(values, range(100), resamples=400)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 0.7 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_whole_groups_are_resampled():
    """Copies of an item add no certainty: the interval stays that of the single items."""
    values = (np.random.default_rng(2).random(60) < 0.6).astype(float)
    single = bootstrap(values, range(60))
    copied = bootstrap(np.repeat(values, 9), np.repeat(np.arange(60), 9).tolist())
    alone = bootstrap(np.repeat(values, 9), range(540))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    assert alone.high - alone.low < 0.5 * (single.high - single.low)


def test_groups_of_several_sizes_weigh_as_many_items_as_they_hold():
    estimate = bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate.value == 0.75
    assert (estimate.low, estimate.high) == (0, 1)


def test_an_estimate_prints_as_percent():
    assert str(bootstrap([1.0, 1.0], ["a", "b"])) == "100.0 [100.0, 100.0]"
