"""Features that follow style rather than content.

Two conversations with the same content in two styles differ in latents by style alone. Over many
such twins, feature j's difference d_j has a mean and a spread over prompts:

    effect size  = mean(d_j) / sd(d_j)      (Cohen's d of paired samples)
    reward part  = w_j mean(d_j)            what the style earns through the feature, exactly

Both with 95 % bootstrap intervals over prompts. The sum of all reward parts is the style's reward.

Legend: M twins, F latents, G prompts, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from sarm.audit.perturb import PERTURBATIONS
from sarm.errors import InputError
from sarm.evaluation.metrics import Benchmark, Estimate, Item
from sarm.evaluation.profiles import LatentSet

RESAMPLES = 1000
RM_BENCH_STYLES = ("length", "markdown")


@dataclass(frozen=True)
class Twins:
    """Plain and styled conversations of equal content, by their rows in `latents`.

    plain, styled: (M,) rows.  prompts: (M,) numbers of prompts.
    """

    style: str
    plain: np.ndarray
    styled: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True)
class StyleScores:
    """One style's effect on every feature, all (F,), and on the reward.

    effect: mean / sd of the differences.  low, high: its 95 % interval.  reward: w_j mean(d_j).
    reward_low, reward_high: its interval.  total: the reward that the style earns in all.
    """

    style: str
    twins: int
    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reward: np.ndarray
    reward_low: np.ndarray
    reward_high: np.ndarray
    total: Estimate

    @property
    def clear(self) -> np.ndarray:
        """(F,) bool: the effect's interval leaves out 0."""
        return (self.low > 0) | (self.high < 0)


def triple_twins(latents: LatentSet) -> list[Twins]:
    """Of RM-Bench's styles: length is plain minus concise, markdown is markdown minus plain.

    Raises:
        InputError: items without three chosen and three rejected answers.
    """
    concise, start = [], 0
    for item in latents.benchmark.items:
        if item.n_chosen != 3 or len(item.conversations) != 6:
            raise InputError(f"{item.where}: needs 3 chosen and 3 rejected answers, as RM-Bench")
        concise += [start, start + 3]
        start += 6
    first = np.array(concise)
    prompts = latents.groups[first]
    return [
        Twins("length", first, first + 1, prompts),
        Twins("markdown", first + 1, first + 2, prompts),
    ]


def perturbed(benchmark: Benchmark, styles: Sequence[str]) -> Benchmark:
    """Every chosen answer with its changed versions: per item plain and styled, style by style.

    A style in which no answer changes is an error; single answers that stay as they are make
    twins without difference, as they do for the reward.
    """
    items, changed = [], dict.fromkeys(styles, 0)
    for item in benchmark.items:
        for talk in item.conversations[: item.n_chosen]:
            versions = []
            for style in styles:
                plainer, more = (change(talk[-1]["content"]) for change in PERTURBATIONS[style])
                changed[style] += plainer != more
                versions += [[*talk[:-1], {**talk[-1], "content": c}] for c in (plainer, more)]
            items.append(Item(versions, 1, item.where, item.group, item.part))
    unchanged = [style for style, count in changed.items() if not count]
    if unchanged:
        raise InputError(f"{benchmark.source}: {unchanged[0]} changes none of the answers")
    return replace(benchmark, name=f"{benchmark.name}, perturbed", items=items)


def perturbed_twins(latents: LatentSet, styles: Sequence[str]) -> list[Twins]:
    """The twins of `perturbed`."""
    first = np.arange(0, len(latents.item), 2 * len(styles))
    prompts = latents.groups[first]
    return [Twins(s, first + 2 * i, first + 2 * i + 1, prompts) for i, s in enumerate(styles)]


def style_scores(
    latents: LatentSet, twins: Twins, weight: np.ndarray, *, seed: int = 0
) -> StyleScores:
    """Effects of one style on all features, with intervals over prompts.

    Args:
        weight: (F,) the head.
    Raises:
        InputError: fewer than 2 prompts.
    """
    difference = (latents.matrix[twins.styled] - latents.matrix[twins.plain]).tocsr()
    number = np.unique(twins.prompts, return_inverse=True)[1]
    n_groups = int(number.max(initial=-1)) + 1
    if n_groups < 2:
        raise InputError(f"style {twins.style}: needs at least 2 prompts, got {n_groups}")
    gather = sp.csr_matrix((np.ones(len(number)), (number, np.arange(len(number)))))
    sums, squares = gather @ difference, gather @ difference.multiply(difference).tocsr()
    counts = np.bincount(number).astype(float)
    mean, effect = _effect(np.ones(n_groups), sums, squares, counts)
    draw = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, difference.shape[1]), np.float32)
    effects = np.empty_like(means)
    totals = np.empty(RESAMPLES)
    for b in range(RESAMPLES):
        times = np.bincount(draw.integers(0, n_groups, n_groups), minlength=n_groups)
        found, effects[b] = _effect(times.astype(float), sums, squares, counts)
        means[b], totals[b] = found, found @ weight
    low, high = np.quantile(effects, [0.025, 0.975], axis=0)
    sides = np.quantile(means, [0.025, 0.975], axis=0) * weight
    total = Estimate(float(mean @ weight), *map(float, np.quantile(totals, [0.025, 0.975])))
    return StyleScores(
        twins.style,
        difference.shape[0],
        effect,
        low,
        high,
        weight * mean,
        sides.min(0),
        sides.max(0),
        total,
    )


def _effect(times, sums, squares, counts) -> tuple[np.ndarray, np.ndarray]:
    n = times @ counts
    mean, square = sums.T @ times / n, squares.T @ times / n
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    spread = np.maximum(spread, 1e-6 * np.abs(mean))  # a shift that never varies: an effect of 1e6
    return mean, np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 0)
