"""Suppressing style features: multipliers fitted on some prompts, judged on others.

With latents cached a profile of multipliers m is a head, and choosing it is convex:

    minimise over m in [low, high]   sum_level a_level mean softplus(-margin(m)) + l2/2 |m - 1|^2

over RM-Bench's pairs. `a` of the hard level (a plainer chosen answer) is what moves along the
trade: the more it weighs, the more style is given up. Ablating the m features with the largest
style reward is the other, cruder curve.

Legend: M pairs, F latents, P profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from scipy.special import expit

from sarm.audit.style import StyleScores
from sarm.errors import InputError
from sarm.evaluation.profiles import LatentSet, score_profiles
from sarm.steering.profile import Change, SteeringProfile
from sarm.training.head import assign_folds

LEVELS = ("easy", "normal", "hard")
HARD_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.7, 1.0, 2.0)
ABLATED = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Point:
    """One profile of the trade: accuracies on the prompts held out from its choice.

    kind: "ablate" or "multiply".  strength: features ablated, or the weight of the hard level.
    fitted: accuracies on the fitting prompts (multipliers: out of fold), which choose.  held: on
    the others.  Both {level: share}.
    """

    kind: str
    strength: float
    profile: SteeringProfile
    fitted: dict[str, float]
    held: dict[str, float]


@dataclass(frozen=True)
class Trade:
    """The curve, accuracies without any change, and the chosen point (None: none is allowed)."""

    points: list[Point]
    fitted: dict[str, float]
    held: dict[str, float]
    chosen: Point | None


def trade(
    fit: LatentSet,
    held: LatentSet,
    styles: Sequence[StyleScores],
    weight: torch.Tensor,
    *,
    features: int = 500,
    low: float = 0.0,
    high: float = 1.0,
    l2: float = 1e-3,
    max_drop: float = 0.01,
) -> Trade:
    """Both curves, and the point with the most hard accuracy whose easy and normal hold.

    Args:
        fit, held: RM-Bench items of different prompts.  weight: (1, F) the head.
        features: how many may change: the largest style rewards among those with a clear effect.
        low, high: bounds of a multiplier; 0 and 1 only suppress.
        max_drop: how much easy and normal may each lose, out of fold, for a point to be chosen.
    Raises:
        InputError: bounds that leave 1 out, or no feature with a clear effect.
    """
    if not low <= 1 <= high:
        raise InputError(f"debias: multipliers must include 1, got [{low}, {high}]")
    order = style_features(styles)
    if not len(order):
        raise InputError("debias: no feature's style effect is clear of 0")
    chosen = order[:features]
    earns = np.max([score.reward for score in styles], axis=0)
    ablating = chosen[np.argsort(-earns[chosen], kind="stable")]
    profiles: list[tuple[str, float, SteeringProfile]] = []
    for count in (n for n in ABLATED if n <= len(ablating)):
        changes = {int(j): Change(multiply=0.0) for j in ablating[:count]}
        profiles.append(("ablate", float(count), _named(changes, f"ablate {count}")))
    out_of_fold = []
    for hard in HARD_WEIGHTS:
        m, scores = _multipliers(fit, weight[0].double().numpy(), chosen, hard, low, high, l2)
        changes = {int(j): Change(multiply=float(x)) for j, x in zip(chosen, m) if x != 1.0}  # noqa: B905
        profiles.append(("multiply", hard, _named(changes, f"multiply, hard {hard:g}")))
        out_of_fold.append(scores)
    heads = torch.cat([weight, *(p.head(weight) for _, _, p in profiles)])
    seen, unseen = (_by_level(one, heads) for one in (fit, held))
    points = []
    for i, (kind, strength, profile) in enumerate(profiles, start=1):
        fitted = (
            seen[i] if kind == "ablate" else out_of_fold[i - 1 - (len(profiles) - len(out_of_fold))]
        )
        points.append(Point(kind, strength, profile, fitted, unseen[i]))
    allowed = [
        p for p in points if all(p.fitted[n] >= seen[0][n] - max_drop for n in ("easy", "normal"))
    ]
    best = max(allowed, key=lambda p: p.fitted["hard"], default=None)
    if best is not None and best.fitted["hard"] <= seen[0]["hard"]:
        best = None
    return Trade(points, seen[0], unseen[0], best)


def style_features(styles: Sequence[StyleScores]) -> np.ndarray:
    """Features with a clear effect in any style, by the size of their largest reward part."""
    clear = np.any([score.clear for score in styles], axis=0)
    size = np.max([np.abs(score.reward) for score in styles], axis=0) * clear
    order = np.argsort(-size, kind="stable")
    return order[size[order] > 0]


def _named(changes: dict[int, Change], text: str) -> SteeringProfile:
    return SteeringProfile(changes, description=f"debias: {text}")


def _by_level(one: LatentSet, heads: torch.Tensor) -> list[dict[str, float]]:
    found = score_profiles(one.benchmark, one.latents, heads).accuracies
    return [{name: float(found[name][p]) for name in LEVELS} for p in range(len(heads))]


def pair_levels(one: LatentSet) -> np.ndarray:
    """(M,) 0 easy, 1 normal, 2 hard, for `LatentSet.pairs` of RM-Bench items."""
    i, j = np.divmod(np.arange(len(one.pairs)) % 9, 3)
    return 1 + np.sign(j - i)


def _multipliers(
    one: LatentSet,
    weight: np.ndarray,
    features: np.ndarray,
    hard: float,
    low: float,
    high: float,
    l2: float,
) -> tuple[np.ndarray, dict[str, float]]:
    """(n,) multipliers of features (n,), and accuracies by level out of fold."""
    difference = (one.matrix[one.pairs[:, 0]] - one.matrix[one.pairs[:, 1]]).tocsr()
    base = difference @ weight
    parts = (difference[:, features] @ sp.diags(weight[features])).tocsr()
    level = pair_levels(one)
    items = one.benchmark.items
    domain = np.array([items[i].part.split("-")[0] for i in one.pairs[:, 2]])
    cell = np.unique(domain, return_inverse=True)[1] * 3 + level
    share = np.array([1.0, 1.0, hard])[level] / np.bincount(cell)[cell]

    def solve(rows: np.ndarray) -> np.ndarray:
        a = share[rows] / share[rows].sum()
        x, offset = parts[rows], base[rows]

        def loss(change: np.ndarray) -> tuple[float, np.ndarray]:
            margin = offset + x @ change
            value = (a * np.logaddexp(0, -margin)).sum() + 0.5 * l2 * change @ change
            return value, x.T @ (-a * expit(-margin)) + l2 * change

        bounds = [(low - 1, high - 1)] * len(features)
        start = np.zeros(len(features))
        options = {"maxiter": 200}
        return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x

    right = np.empty(len(base))
    fold_of = assign_folds(one.item_groups[one.pairs[:, 2]].tolist(), 5)
    for fold in np.unique(fold_of):
        mine = fold_of == fold
        right[mine] = base[mine] + parts[mine] @ solve(~mine) > 0
    means = np.bincount(cell, right) / np.bincount(cell)
    by_level = means.reshape(-1, 3).mean(0)
    scores = dict(zip(LEVELS, map(float, by_level), strict=True))
    return 1 + solve(np.ones(len(base), bool)), scores
