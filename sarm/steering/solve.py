"""Profiles that move a domain and little else: a linear program's closed form, and a gate.

Multiplying a domain's features moves every response in which they are active, and with a few
thousand latents none is silent elsewhere. So the off-target sets take part in the choice:

`bounded_head`   adds d to the head weight:   minimise  d'(W + a V + ridge) d   subject to
                 mean_target(z) d = shift,    mean_off(z) d = 0 for every off-target set
                 W: second moment of within-prompt differences off target (what changes rankings);
                 V: covariance over target answers (a shift that all of them share carries over).
`fit_gate`       a logistic model of the domain against the off-target sets, weighted alike, whose
                 sum opens a gate; threshold from out-of-fold scores so that off-target means and
                 rankings stay within bounds.

Legend: N conversations, F latents, S off-target sets.
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
from sarm.steering.profile import Gate
from sarm.training.head import assign_folds

if TYPE_CHECKING:
    from sarm.evaluation.profiles import LatentSet

MAX_DENSE = 8192  # of the (F, F) matrices of `bounded_head`: 0.5 GB


def bounded_head(
    target: LatentSet,
    off: Sequence[LatentSet],
    shift: float,
    *,
    features: np.ndarray | None = None,
    spread: float = 0.1,
    ridge: float = 1.0,
) -> np.ndarray:
    """(F,) additions to the head weight that raise the target's chosen answers by `shift`.

    Args:
        shift: in units of the reward.  features: those that may change, None: all.
        spread: a, weight of V.  ridge: as a multiple of W's mean diagonal.
    Raises:
        InputError: more than 8,192 features, or means of target and off-target sets that no head
        tells apart.
    """
    width = target.n_latents
    columns = np.arange(width) if features is None else np.asarray(features)
    if len(columns) > MAX_DENSE:
        raise InputError(f"at most {MAX_DENSE} features can change at once, got {len(columns)}")
    better = target.matrix[target.chosen][:, columns]
    mean = np.asarray(better.mean(0)).ravel()
    within = sum(_second_moment(_differences(one)[:, columns]) for one in off) / len(off)
    matrix = within + spread * (_second_moment(better) - np.outer(mean, mean))
    matrix[np.diag_indices_from(matrix)] += ridge * np.trace(within) / len(columns) + 1e-12
    means = [np.asarray(one.matrix[:, columns].mean(0)).ravel() for one in off]
    bounds = np.column_stack([mean, *means])
    solved = np.linalg.solve(matrix, bounds)
    wanted = np.zeros(bounds.shape[1])
    wanted[0] = shift
    coefficients, _, rank, _ = np.linalg.lstsq(bounds.T @ solved, wanted, rcond=1e-10)
    change = solved @ coefficients
    if abs(mean @ change - shift) > 1e-3 * abs(shift):
        raise InputError(
            f"no change of {len(columns)} features moves the target and not the off-target sets"
        )
    out = np.zeros(width)
    out[columns] = change
    return out


@dataclass(frozen=True)
class GateFit:
    """A gate and what it does out of fold, at the slope that gives the asked shift.

    opens: share of the target's chosen answers.  off_means: shift of each off-target set's mean in
    its sd.  off_changes: share of its pairs whose order changes.  within: whether both keep to
    their bounds.
    """

    gate: Gate
    opens: float
    off_means: list[float]
    off_changes: list[float]
    within: bool


def fit_gate(
    target: LatentSet,
    off: Sequence[LatentSet],
    rewards: Sequence[np.ndarray],
    shift: float,
    *,
    features: int | None = None,
    max_mean: float = 0.04,
    max_changes: float = 0.0075,
    l2: float = 0.1,
    folds: int = 10,
) -> GateFit:
    """A gate for a domain, with the lowest threshold that keeps off-target sets within bounds.

    The bounds are a little tighter than the 0.05 sd and 1 % that are to hold on other prompts.
    If no threshold keeps to them, the one that misses them least is returned.

    Args:
        rewards: (N,) of each off-target set, as the model gives them.
        shift: of the target's chosen answers, in units of the reward.
        features: how many the gate may use, None: all; the largest of a first fit are kept.
    """
    matrix = sp.vstack([target.matrix, *(one.matrix for one in off)]).tocsr()
    sizes = [one.matrix.shape[0] for one in (target, *off)]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    weight = np.concatenate([np.full(size, 1 / size) for size in sizes]) / len(sizes)
    prompts = np.concatenate([one.groups for one in (target, *off)])
    scale = _scales(matrix)
    scaled = (matrix @ sp.diags(1 / scale)).tocsr()
    inside = owner == 0
    if features is not None:
        first = _logistic(scaled, inside, weight, l2)
        dropped = np.argsort(-np.abs(first), kind="stable")[features:]
        keep = np.ones(scaled.shape[1])
        keep[dropped] = 0
        scaled = (scaled @ sp.diags(keep)).tocsr()
        scaled.eliminate_zeros()
    fold_of = assign_folds(list(zip(owner.tolist(), prompts.tolist(), strict=True)), folds)
    score = np.empty(len(owner))
    for fold in np.unique(fold_of):
        held = fold_of == fold
        found = _logistic(scaled[~held], inside[~held], weight[~held], l2)
        score[held] = scaled[held] @ found
    better = score[inside][target.chosen]
    trials = []
    for above in np.quantile(better, np.linspace(0, 0.95, 39)):
        slope = shift / np.maximum(0, better - above).mean()
        means, changes = [], []
        for i, (one, r) in enumerate(zip(off, rewards, strict=True), start=1):
            moved = slope * np.maximum(0, score[owner == i] - above)
            means.append(float(moved.mean() / r.std()))
            changes.append(changed_pairs(one.pairs, r, r + moved).mean())
        excess = max(
            max(map(abs, means)) / max_mean,
            max(changes) / max_changes,
        )
        trials.append((excess, above, slope, means, changes))
        if excess <= 1:
            break
    excess, above, slope, means, changes = min(trials, key=lambda trial: trial[0])
    final = _logistic(scaled, inside, weight, l2) / scale
    used = np.flatnonzero(final)
    gate = Gate({int(j): float(final[j]) for j in used}, float(above), float(slope))
    return GateFit(gate, float((better > above).mean()), means, changes, excess <= 1)


def changed_pairs(pairs: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(M,) 1 where a pair's order is another one than before, ties being an order of their own."""
    c, r = pairs[:, 0], pairs[:, 1]
    return (np.sign(before[c] - before[r]) != np.sign(after[c] - after[r])).astype(float)


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


def _differences(one: LatentSet) -> sp.csr_matrix:
    """(M, F) chosen minus rejected of every pair."""
    return one.matrix[one.pairs[:, 0]] - one.matrix[one.pairs[:, 1]]


def _second_moment(matrix: sp.csr_matrix) -> np.ndarray:
    return (matrix.T @ matrix).toarray() / matrix.shape[0]
