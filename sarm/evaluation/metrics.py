"""From rewards to accuracies with intervals, for any number of reward models in one pass.

Legend: I items, C columns, P rewards (models or steering profiles), G groups (prompts of a part),
M measures, R bootstrap resamples.

A rule turns the rewards of an item into values of named columns; a column's mean is taken over the
items that have it, and a measure is a weighted sum of such means. That is enough for every
benchmark here: "overall" of RewardBench 2 is 1/6 of five accuracies and 1/6 of the Ties formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sarm.errors import InputError
from sarm.tokens import Message

RESAMPLES = 2000


@dataclass(frozen=True)
class Item:
    """Conversations that are compared with each other: the first `n_chosen` are the better ones."""

    conversations: list[list[Message]]
    n_chosen: int
    where: str
    group: str  # the prompt: intervals are bootstrapped over groups
    part: str = ""  # the subset or domain; groups are resampled within their part


# (items, [(chosen (n_chosen, P), rejected (n_rejected, P)), ...]) -> {column: (P,)} of every item
Scores = Sequence[tuple[np.ndarray, np.ndarray]]
Judge = Callable[[Sequence[Item], Scores], list[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Measure:
    """A reported number: a weighted sum of column means. `detail` ones are left out of plots."""

    name: str
    weights: Mapping[str, float]
    detail: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Items, the rule that judges their rewards, and what is reported."""

    name: str
    items: list[Item]
    judge: Judge
    measures: tuple[Measure, ...]
    source: str = ""

    @property
    def n_conversations(self) -> int:
        """Of all items together."""
        return sum(len(item.conversations) for item in self.items)


@dataclass(frozen=True)
class Estimate:
    """A mean over items and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Score:
    """One reward's result in one measure.

    `ties`: items with a chosen and a rejected answer of equal reward. `truncated`: conversations
    that were cut. `difference`: to the first reward, on the same resamples; None for the first.
    """

    estimate: Estimate
    ties: int
    truncated: int
    difference: Estimate | None


@dataclass(frozen=True)
class Result:
    """One measure of one benchmark, for every reward by its name."""

    benchmark: str
    measure: str
    items: int
    scores: dict[str, Score]
    detail: bool = False


@dataclass(frozen=True)
class Judged:
    """Values of every item and column, NaN where an item does not have the column."""

    columns: tuple[str, ...]
    values: np.ndarray  # (I, C, P)
    ties: np.ndarray  # (I, P) bool

    @property
    def present(self) -> np.ndarray:
        """(I, C) bool: which items have which column."""
        return ~np.isnan(self.values[:, :, 0])

    def weights(self, measures: Sequence[Measure]) -> np.ndarray:
        """(M, C)."""
        return np.array([[m.weights.get(c, 0.0) for c in self.columns] for m in measures])


def judge(benchmark: Benchmark, rewards: np.ndarray) -> Judged:
    """Apply a benchmark's rule to rewards (N, P), rows in the order of all items' conversations.

    Raises:
        InputError: another number of rows than of conversations, or a reward that is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    expected = benchmark.n_conversations
    if rewards.ndim != 2 or len(rewards) != expected or not rewards.shape[1]:
        raise InputError(
            f"{benchmark.name}: {expected} conversations but rewards of shape {rewards.shape}"
        )
    if not np.isfinite(rewards).all():
        row, column = np.argwhere(~np.isfinite(rewards))[0]
        raise InputError(
            f"{benchmark.name}: the reward of conversation {row} is {rewards[row, column]}"
        )
    scores, start = [], 0
    for item in benchmark.items:
        middle, end = start + item.n_chosen, start + len(item.conversations)
        scores.append((rewards[start:middle], rewards[middle:end]))
        start = end
    rows = benchmark.judge(benchmark.items, scores)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    place = {name: i for i, name in enumerate(columns)}
    values = np.full((len(rows), len(columns), rewards.shape[1]), np.nan)
    for i, row in enumerate(rows):
        for name, value in row.items():
            values[i, place[name]] = value
    ties = np.array([(c[:, None] == r[None]).any(axis=(0, 1)) for c, r in scores])
    return Judged(columns, values, ties)


def accuracies(benchmark: Benchmark, rewards: np.ndarray) -> dict[str, np.ndarray]:
    """{measure: (P,)} of rewards (N, P), without intervals."""
    judged = judge(benchmark, rewards)
    means = np.nanmean(judged.values, axis=0)  # (C, P); every column has an item
    table = judged.weights(benchmark.measures) @ means
    return {m.name: row for m, row in zip(benchmark.measures, table, strict=True)}


def evaluate(
    benchmark: Benchmark,
    rewards: Mapping[str, Sequence[float]],
    truncated: Mapping[str, Sequence[bool]] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Result]:
    """Every measure of a benchmark with 95 % intervals, for several rewards side by side.

    Args:
        rewards: by name, one number per conversation, items in order.
        truncated: by the same names, whether each conversation was cut.
    Raises:
        InputError: another number of rewards than of conversations, or one that is not finite.
    """
    names = list(rewards)
    for name, column in rewards.items():
        if len(column) != benchmark.n_conversations:
            raise InputError(
                f"{benchmark.name}: {benchmark.n_conversations} conversations but {len(column)} "
                f"rewards of {name}"
            )
    judged = judge(benchmark, np.array([rewards[n] for n in names], np.float64).T)
    weights, present = judged.weights(benchmark.measures), judged.present
    groups = [(item.part, item.group) for item in benchmark.items]
    point, replicates = _bootstrap(judged.values, groups, weights, resamples, seed)
    owner = np.repeat(np.arange(len(groups)), [len(i.conversations) for i in benchmark.items])
    cut = {
        name: np.bincount(owner, weights=(truncated or {}).get(name), minlength=len(groups))
        if name in (truncated or {})
        else np.zeros(len(groups))
        for name in names
    }
    results = []
    for m, measure in enumerate(benchmark.measures):
        mine = present[:, weights[m] != 0].any(1)
        scores = {
            name: Score(
                _estimate(point[m, p], replicates[:, m, p]),
                int(judged.ties[mine, p].sum()),
                int(cut[name][mine].sum()),
                _estimate(point[m, p] - point[m, 0], replicates[:, m, p] - replicates[:, m, 0])
                if p
                else None,
            )
            for p, name in enumerate(names)
        }
        results.append(
            Result(benchmark.name, measure.name, int(mine.sum()), scores, measure.detail)
        )
    return results


def bootstrap(
    values: Sequence[float], groups: Sequence, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of values and the 95 % percentile interval when whole groups are resampled."""
    table = np.asarray(values, np.float64)[:, None, None]
    one = np.ones((1, 1))
    point, replicates = _bootstrap(table, [("", g) for g in groups], one, resamples, seed)
    return _estimate(point[0, 0], replicates[:, 0, 0])


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Standard error of the mean of values (M,) when whole groups are sampled; inf for one group.

    groups: (M,) integers >= 0.
    """
    sums = np.bincount(groups, values - values.mean())
    n = len(np.unique(groups))
    return float(np.sqrt(n / (n - 1) * sums @ sums)) / len(values) if n > 1 else np.inf


def _estimate(value: float, replicates: np.ndarray) -> Estimate:
    low, high = np.nanquantile(replicates, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _bootstrap(
    values: np.ndarray, groups: Sequence[tuple], weights: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measures (M, P) of values (I, C, P), and (R, M, P) of resamples of groups in their parts.

    A replicate is NaN where a resample holds no item of a column, which takes a part in which few
    groups have that column; quantiles leave those replicates out.
    """
    n_items, n_columns, n_rewards = values.shape
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    member = np.array([names[g] for g in groups])
    sums = np.zeros((len(names), n_columns, n_rewards))
    counts = np.zeros((len(names), n_columns))
    np.add.at(sums, member, np.nan_to_num(values))
    np.add.at(counts, member, ~np.isnan(values[:, :, 0]))
    parts: dict = {}
    for (part, _), i in names.items():
        parts.setdefault(part, []).append(i)
    draw = np.random.default_rng(seed)
    top = np.zeros((resamples, n_columns * n_rewards))
    bottom = np.zeros((resamples, n_columns))
    for mine in parts.values():
        size = len(mine)
        rows = max(1, 4_000_000 // size)  # resamples at once: memory stays under 100 MB
        for start in range(0, resamples, rows):
            n = min(rows, resamples - start)
            drawn = draw.integers(0, size, (n, size)) + size * np.arange(n)[:, None]
            times = np.bincount(drawn.ravel(), minlength=n * size).reshape(n, size).astype(float)
            top[start : start + n] += times @ sums[mine].reshape(size, -1)
            bottom[start : start + n] += times @ counts[mine]
    with np.errstate(invalid="ignore"):
        means = top.reshape(resamples, n_columns, n_rewards) / bottom[:, :, None]
    point = weights @ (sums.sum(0) / counts.sum(0)[:, None])
    replicates = np.empty((resamples, *point.shape))
    for m, row in enumerate(weights):  # a column that the measure does not use may be NaN
        used = np.flatnonzero(row)
        replicates[:, m] = np.einsum("c,rcp->rp", row[used], means[:, used])
    return point, replicates
