"""A benchmark is a list of items; rewards become a value per item, and values an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sarm.errors import InputError
from sarm.tokens import Message


@dataclass(frozen=True)
class Item:
    """Conversations that are compared with each other: the first `n_chosen` are the better ones."""

    conversations: list[list[Message]]
    n_chosen: int
    where: str
    group: str  # the prompt: intervals are bootstrapped over groups


@dataclass(frozen=True)
class Benchmark:
    """Items and how the rewards of one item (chosen first) become named values in [0, 1]."""

    name: str
    items: list[Item]
    judge: Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over items and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Result:
    """Estimates of one benchmark, and how many items held a tie across the chosen/rejected line."""

    benchmark: str
    estimates: dict[str, Estimate]
    items: int
    ties: int
    truncated: int


def evaluate(benchmark: Benchmark, rewards: Sequence[float], truncated: int = 0) -> Result:
    """Judge rewards given in the order of all items' conversations.

    Args:
        rewards: one per conversation, items in order.
        truncated: how many conversations were cut, to be reported.
    Raises:
        InputError: another number of rewards than of conversations, or one that is not finite.
    """
    values: dict[str, list[float]] = {}
    everything = np.asarray(rewards, dtype=np.float64)
    expected = sum(len(item.conversations) for item in benchmark.items)
    if len(everything) != expected:
        raise InputError(
            f"{benchmark.name}: {expected} conversations but {len(everything)} rewards"
        )
    if not np.isfinite(everything).all():
        bad = int(np.flatnonzero(~np.isfinite(everything))[0])
        raise InputError(f"{benchmark.name}: the reward of conversation {bad} is {everything[bad]}")
    start = ties = 0
    for item in benchmark.items:
        scores = everything[start : start + len(item.conversations)]
        start += len(item.conversations)
        chosen, rejected = scores[: item.n_chosen], scores[item.n_chosen :]
        ties += bool(np.isin(chosen, rejected).any())
        for name, value in benchmark.judge(chosen, rejected).items():
            values.setdefault(name, []).append(value)
    groups = [item.group for item in benchmark.items]
    estimates = {name: bootstrap(column, groups) for name, column in values.items()}
    return Result(benchmark.name, estimates, len(benchmark.items), ties, truncated)


def bootstrap(
    values: Sequence[float], groups: Sequence[str], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of values and the 95 % percentile interval when whole groups are resampled."""
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[g] for g in groups])
    sums = np.bincount(member, weights=values, minlength=len(names))
    sizes = np.bincount(member, minlength=len(names))
    draw, means = np.random.default_rng(seed), []
    rows = max(1, 4_000_000 // len(names))  # resamples at once: memory stays under 100 MB
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(names))
        drawn = draw.integers(0, len(names), shape)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(sums.sum() / sizes.sum()), float(low), float(high))
