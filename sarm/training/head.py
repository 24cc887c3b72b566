"""The value head: a convex problem over frozen features, solved to its optimum.

Bradley-Terry with an L2 penalty, over feature differences  D = F(chosen) - F(rejected)  (M, F):

    minimise over w   f(w)  +  l2/2 * ||s * w||^2        f: see `PairLoss` (margins, centring)

where s_j^2 = (mean square of column j) + pool * (mean of that over all columns that occur). With
pool = 0 the fit does not depend on the columns' scales: right for dense features. Sparse features
want pool = 1 (`SPARSE_POOL`): a latent that hardly differs in training would otherwise get a huge
weight for fitting one pair, which explodes on a new answer where the latent is active. No
intercept: it cancels in differences.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

from sarm.errors import InputError
from sarm.training.pair_loss import PairLoss

SPARSE_POOL = 1.0
L2_GRID = tuple(float(x) for x in np.logspace(-4, 1, 11))


@dataclass(frozen=True)
class HeadFit:
    """The optimum and how it was reached.

    weight: (F,) in the units of the features.  loss: of the training pairs, without penalty.
    gradient_norm: largest absolute component at the optimum, in scaled units.
    cv: mean held-out log loss for every l2 that was tried, see `_cross_validate` (else empty).
    """

    weight: np.ndarray
    l2: float
    loss: float
    accuracy: float
    gradient_norm: float
    iterations: int
    seconds: float
    cv: dict[float, float]


def fit_head(
    differences,
    *,
    l2: float | None = None,
    groups: Sequence | None = None,
    folds: int = 5,
    pool: float = 0.0,
    margins: Sequence[float] | None = None,
    sums=None,
    centre: float = 0.0,
) -> HeadFit:
    """Fit the head; with l2=None its strength is chosen by cross-validation.

    Args:
        differences: (M, F) features of chosen minus rejected, scipy CSR or numpy.
        l2: penalty; None: the best held-out log loss over `L2_GRID`.
        groups: (M,) prompt of each pair; folds never split a prompt.
        pool: how much of the columns' common scale the penalty uses, see the top.
        margins: (M,) by how much the chosen answer should win; None: 0.
        sums: (M, F) features of chosen plus rejected, where centre > 0.
        centre: weight of the mean squared sum of a pair's two rewards.
    Raises:
        InputError: fewer than 2 pairs, non-finite features, no pair that differs, or l2=None with
        pairs of a single prompt.
    """
    started = time.perf_counter()
    problem, scale = scaled_problem(
        differences, pool=pool, margins=margins, sums=sums, centre=centre
    )
    cv: dict[float, float] = {}
    if l2 is None:
        cv = _cross_validate(problem, groups, folds)
        l2 = min(cv, key=lambda value: (cv[value], -value))
    elif not l2 > 0:
        raise InputError(f"fit_head: l2 must be positive, got {l2}")
    result = _solve(problem, l2, np.zeros(problem.shape[1]))
    return HeadFit(
        weight=result.x / scale,
        l2=l2,
        loss=problem(result.x)[0],
        accuracy=pair_accuracy(problem.differences @ result.x),
        gradient_norm=float(np.abs(result.jac).max()),
        iterations=int(result.nit),
        seconds=time.perf_counter() - started,
        cv=cv,
    )


def scaled_problem(
    differences,
    *,
    pool: float = 0.0,
    margins: Sequence[float] | None = None,
    sums=None,
    centre: float = 0.0,
) -> tuple[PairLoss, np.ndarray]:
    """The problem in weights s * w, and s (F,); arguments and errors as in `fit_head`."""
    pairs = differences.shape[0]
    if pairs < 2:
        raise InputError(f"fit_head: needs at least 2 pairs, got {pairs}")
    data = differences.data if sp.issparse(differences) else differences
    if not np.isfinite(data).all():
        raise InputError("fit_head: features hold NaN or infinite values")
    if not np.any(data):
        raise InputError("fit_head: chosen and rejected have equal features in every pair")
    if centre and sums is None:
        raise InputError("fit_head: centring needs the sums of the features")
    scale = _scales(differences, pool)
    asked = np.zeros(pairs) if margins is None else np.asarray(margins, dtype=np.float64)
    if asked.shape != (pairs,) or not np.isfinite(asked).all():
        raise InputError(f"fit_head: margins must be {pairs} finite numbers")
    totals = _divided(sums, scale) if centre else None
    return PairLoss(_divided(differences, scale), asked, totals, centre), scale


def cross_validate(
    differences, groups: Sequence | None, folds: int, pool: float = 0.0
) -> dict[float, float]:
    """Mean held-out log loss of the l2 in `L2_GRID`, as `fit_head` finds them."""
    return _cross_validate(scaled_problem(differences, pool=pool)[0], groups, folds)


def _cross_validate(problem: PairLoss, groups: Sequence | None, folds: int) -> dict[float, float]:
    """Strong penalties first, warm-started; ends when two in a row were worse than the best.

    Weak penalties take most of the iterations, and lie far on the overfitting side by then.
    """
    pairs, width = problem.shape
    parts = list(split_folds(problem, groups, folds))
    weights = [np.zeros(width) for _ in parts]
    losses: dict[float, float] = {}
    for l2 in sorted(L2_GRID, reverse=True):
        total = 0.0
        for i, (train, test) in enumerate(parts):
            weights[i] = _solve(train, l2, weights[i], tolerance=1e-4).x
            total += test(weights[i])[0] * test.shape[0]
        losses[l2] = total / pairs
        if list(losses).index(min(losses, key=losses.__getitem__)) < len(losses) - 2:
            break
    return losses


def split_folds(
    problem: PairLoss, groups: Sequence | None, folds: int
) -> Iterator[tuple[PairLoss, PairLoss]]:
    """(training part, held-out part) of every fold; a prompt's pairs stay together."""
    fold_of = assign_folds(groups if groups is not None else range(problem.shape[0]), folds)
    if not fold_of.any():
        raise InputError("fit_head: cross-validation needs pairs of 2 prompts or more; give an l2")
    for fold in np.unique(fold_of):
        yield problem.rows(fold_of != fold), problem.rows(fold_of == fold)


def assign_folds(groups: Sequence, folds: int, seed: int = 0) -> np.ndarray:
    """(M,) fold of each row; rows of one group share a fold."""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[g]: i % min(folds, len(names)) for i, g in enumerate(order)}
    return np.array([fold_of[g] for g in groups])


def pair_accuracy(margins: np.ndarray) -> float:
    """Share of pairs with a positive margin; a tie counts a half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def _scales(differences, pool: float = 0.0) -> np.ndarray:
    """(F,) scales s_j of the columns of D, see the top."""
    rows = differences.shape[0]
    if sp.issparse(differences):
        square = np.asarray(differences.multiply(differences).sum(axis=0)).ravel() / rows
    else:
        square = np.square(differences, dtype=np.float64).mean(axis=0)
    scale = np.sqrt(square + pool * square[square > 0].mean())
    scale[scale == 0] = 1.0  # a column that never occurs keeps weight zero
    return scale


def _divided(matrix, scale: np.ndarray):
    if sp.issparse(matrix):
        return (matrix.astype(np.float64) @ sp.diags(1.0 / scale)).tocsr()
    return matrix.astype(np.float64) / scale


def _solve(problem: PairLoss, l2: float, start: np.ndarray, tolerance: float = 1e-8):
    def objective(weight: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = problem(weight)
        return loss + 0.5 * l2 * weight @ weight, gradient + l2 * weight

    return minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0, "maxcor": 20},
    )
