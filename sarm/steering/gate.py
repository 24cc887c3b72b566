"""A gate for a domain: open for its answers, shut elsewhere, with bounds that hold out of fold.

A logistic model of the domain against the off-target sets, weighted alike, gives every answer a
score s, and where s > above the reward rises by slope (s - above). Both numbers come from scores
out of fold, and none from what the gate will be judged on:

    above   the lowest at which, for every off-target set, the share of pairs with an answer that
            the gate moves, plus `margin` standard errors over prompts, is at most `max_touched`. A
            pair that is not touched keeps its order whatever the slope.
    slope   the one that lifts the chosen answers of the domain by `shift`: of the fitting set out
            of fold, or of `tune`, another sample of the domain, because a gate opens less often for
            answers of another source than for those it was fitted on.

Legend: N conversations, F latents, S off-target sets, M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import expit

from sarm.errors import InputError
from sarm.evaluation.metrics import standard_error
from sarm.steering.profile import Gate
from sarm.steering.solve import changed_pairs
from sarm.training.head import assign_folds

if TYPE_CHECKING:
    from sarm.evaluation.profiles import LatentSet


@dataclass(frozen=True)
class OffTarget:
    """What a gate does to one off-target set, out of fold.

    touched: share of pairs with an answer that moves.  error: its standard error over prompts.
    mean: shift of the mean reward in sd of its rewards.  changes: share of pairs whose order
    changes.
    """

    touched: float
    error: float
    mean: float
    changes: float


@dataclass(frozen=True)
class GateFit:
    """A gate, and what it does where it did not see the prompts.

    opens: share of the domain's chosen answers, out of fold.  tuned: share of those of `tune`.
    within: whether the off-target sets keep to their bounds.
    """

    gate: Gate
    opens: float
    tuned: float
    off: list[OffTarget]
    within: bool


def fit_gate(
    target: LatentSet,
    off: Sequence[LatentSet],
    rewards: Sequence[np.ndarray],
    shift: float,
    *,
    tune: LatentSet | None = None,
    features: int | None = None,
    max_touched: float = 0.01,
    max_mean: float = 0.05,
    margin: float = 1.0,
    l2: float = 0.1,
    folds: int = 10,
) -> GateFit:
    """A gate for a domain; if no threshold keeps the bounds, the one that misses them least.

    Args:
        rewards: (N,) of each off-target set, as the model gives them.
        shift: mean rise of the chosen answers of `tune` (None: of the target), in units of the
            reward.
        features: how many the gate may use, None: all; those of a first fit with the largest
            weights, in every fold anew.
        max_mean: of an off-target mean's shift, in sd.
    Raises:
        InputError: fewer than 2 prompts in a set, off-target sets without pairs or whose rewards
        are all equal, no active feature, or a gate that never opens for `tune`.
    """
    sets = (target, *off)
    for one, r in zip(off, rewards, strict=True):
        if not len(one.pairs) or not np.std(r) > 0:
            raise InputError(f"gate: {one.benchmark.name} has no pairs, or equal rewards only")
    for one in sets:
        if len(np.unique(one.groups)) < 2:
            raise InputError(f"gate: {one.benchmark.name} needs at least 2 prompts")
    matrix = sp.vstack([one.matrix for one in sets]).tocsr()
    if not matrix.count_nonzero():  # nnz counts the zeros that fill rows up
        raise InputError("gate: no feature is active")
    sizes = [one.matrix.shape[0] for one in sets]
    owner = np.repeat(np.arange(len(sets)), sizes)
    weight = np.repeat([1 / size for size in sizes], sizes)
    fold_of = np.concatenate([assign_folds(one.groups.tolist(), folds) for one in sets])
    scale = _scales(matrix)
    scaled = (matrix @ sp.diags(1 / scale)).tocsr()
    score = np.empty(len(owner))
    for fold in np.unique(fold_of):
        held = fold_of == fold
        found = _fit(scaled[~held], owner[~held] == 0, weight[~held], l2, features)
        score[held] = scaled[held] @ found
    final = _fit(scaled, owner == 0, weight, l2, features) / scale
    better = score[owner == 0][target.chosen]
    lifted = better if tune is None else (tune.matrix @ final)[tune.chosen]
    trials = []
    for above in np.quantile(better, np.linspace(0, 0.95, 96)):
        rise = np.maximum(0, lifted - above).mean()
        if not rise > 0:
            break
        slope = shift / rise
        found_off = [
            _off_target(one, r, score[owner == i], above, slope)
            for i, (one, r) in enumerate(zip(off, rewards, strict=True), start=1)
        ]
        excess = max(
            max((o.touched + margin * o.error) / max_touched, abs(o.mean) / max_mean)
            for o in found_off
        )
        trials.append((excess, above, slope, found_off))
        if excess <= 1:
            break
    if not trials:
        raise InputError("gate: it opens for none of the answers that set its strength")
    excess, above, slope, found_off = min(trials, key=lambda trial: trial[0])
    gate = Gate({int(j): float(final[j]) for j in np.flatnonzero(final)}, float(above), slope)
    opens, tuned = (float((scores > above).mean()) for scores in (better, lifted))
    return GateFit(gate, opens, tuned, found_off, excess <= 1)


def _off_target(
    one: LatentSet, rewards: np.ndarray, score: np.ndarray, above: float, slope: float
) -> OffTarget:
    moved = slope * np.maximum(0, score - above)
    touched = (moved[one.pairs[:, :2]] != 0).any(1).astype(float)
    return OffTarget(
        float(touched.mean()),
        standard_error(touched, one.item_groups[one.pairs[:, 2]]),
        float(moved.mean() / rewards.std()),
        float(changed_pairs(one.pairs, rewards, rewards + moved).mean()),
    )


def _fit(
    x: sp.csr_matrix, inside: np.ndarray, weight: np.ndarray, l2: float, features: int | None
) -> np.ndarray:
    """(F,) weights, at most `features` of them not zero."""
    found = _logistic(x, inside, weight, l2)
    if features is None or features >= len(found):
        return found
    kept = np.sort(np.argsort(-np.abs(found), kind="stable")[:features])
    out = np.zeros(len(found))
    out[kept] = _logistic(x[:, kept], inside, weight, l2)
    return out


def _logistic(x: sp.csr_matrix, inside: np.ndarray, weight: np.ndarray, l2: float) -> np.ndarray:
    """(F,) weights of a weighted logistic regression; its intercept is left to the threshold."""
    sign = np.where(inside, 1.0, -1.0)
    weight = weight / weight.sum()

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ v[:-1] + v[-1])
        pull = -sign * expit(-margin) * weight
        value = (np.logaddexp(0, -margin) * weight).sum() + 0.5 * l2 * v[:-1] @ v[:-1]
        return value, np.append(x.T @ pull + l2 * v[:-1], pull.sum())

    start = np.zeros(x.shape[1] + 1)
    options = {"maxiter": 500, "gtol": 1e-7, "ftol": 0}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x[:-1]


def _scales(matrix: sp.csr_matrix) -> np.ndarray:
    """(F,) root mean squares, pooled so that a rare feature gets no huge weight."""
    square = np.asarray(matrix.multiply(matrix).mean(0)).ravel()
    return np.sqrt(square + square[square > 0].mean())
