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

from sarm.errors import InputError
from sarm.training.newton import minimise
from sarm.training.pair_loss import PairLoss, mean_squares

SPARSE_POOL = 1.0
WIDEST_ROTATED = 1024  # F^3 work: 0.3 s for a 576-wide probe, minutes at 4,096 (two CPU cores)
L2_GRID = tuple(float(x) for x in np.logspace(-4, 1, 11))


@dataclass(frozen=True)
class HeadFit:
    """The optimum and how it was reached.

    weight: (F,) in the units of the features.  loss: of the training pairs, without penalty.
    gradient_norm: largest absolute component at the optimum, in scaled units.
    iterations: Newton steps, or heads of a path.  seconds: cross-validation included.
    cv: mean held-out log loss for every l2 that was tried, see `cross_validate` (else empty).
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
        InputError: fewer than 2 pairs, non-finite features, no pair that differs, l2=None with
        pairs of a single prompt, or an l2, a margin or a centre out of range.
    """
    started = time.perf_counter()
    problem, scale = scaled_problem(
        differences, pool=pool, margins=margins, sums=sums, centre=centre
    )
    # a rotation leaves |w| as it is; to the principal axes, it makes the Hessian nearly diagonal
    axes = _principal_axes(problem)
    turned = problem if axes is None else PairLoss(problem.differences @ axes, problem.margins)
    cv: dict[float, float] = {}
    if l2 is None:
        cv = cross_validate(turned, groups, folds)
        l2 = min(cv, key=lambda value: (cv[value], -value))
    elif not 0 < l2 < np.inf:
        raise InputError(f"fit_head: l2 must be positive, got {l2}")
    found = minimise(turned, l2, np.zeros((turned.shape[1], 1)))
    weight = found.weight[:, 0] if axes is None else axes @ found.weight[:, 0]
    loss, gradient = problem(weight)
    return HeadFit(
        weight=weight / scale,
        l2=l2,
        loss=loss,
        accuracy=pair_accuracy(problem.differences @ weight),
        gradient_norm=float(np.abs(gradient + l2 * weight).max()),
        iterations=found.steps,
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
    if not 0 <= centre < np.inf:
        raise InputError(f"fit_head: centre must be >= 0, got {centre}")
    if centre and sums is None:
        raise InputError("fit_head: centring needs the sums of the features")
    scale = _scales(differences, pool)
    asked = np.zeros(pairs) if margins is None else np.asarray(margins, dtype=np.float64)
    if asked.shape != (pairs,) or not np.isfinite(asked).all():
        raise InputError(f"fit_head: margins must be {pairs} finite numbers")
    totals = _divided(sums, scale) if centre else None
    return PairLoss(_divided(differences, scale), asked, totals, centre), scale


def cross_validate(problem: PairLoss, groups: Sequence | None, folds: int) -> dict[float, float]:
    """Mean held-out log loss of the penalties of `L2_GRID`, strong ones first, warm-started.

    Ends when two in a row were worse than the best: weak penalties take most of the iterations,
    and lie far on the overfitting side by then.
    """
    held = held_out(problem.shape[0], groups, folds)
    shares = ~held / (~held).sum(0)
    weight = np.zeros((problem.shape[1], held.shape[1]))
    losses: dict[float, float] = {}
    for l2 in sorted(L2_GRID, reverse=True):
        weight = minimise(problem, l2, weight, shares, tolerance=1e-4).weight
        losses[l2] = float(problem.values(*problem.products(weight), held / len(held)).sum())
        if list(losses).index(min(losses, key=losses.__getitem__)) < len(losses) - 2:
            break
    return losses


def held_out(pairs: int, groups: Sequence | None, folds: int) -> np.ndarray:
    """(M, folds) whether a pair belongs to a fold, and is not trained on there."""
    fold_of = assign_folds(groups if groups is not None else range(pairs), folds)
    if not fold_of.any():
        raise InputError("fit_head: cross-validation needs pairs of 2 prompts or more; give an l2")
    return fold_of[:, None] == np.arange(fold_of.max() + 1)


def split_folds(
    problem: PairLoss, groups: Sequence | None, folds: int
) -> Iterator[tuple[PairLoss, PairLoss]]:
    """(training part, held-out part) of every fold; a prompt's pairs stay together."""
    for held in held_out(problem.shape[0], groups, folds).T:
        yield problem.rows(~held), problem.rows(held)


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
    square = mean_squares(differences)
    scale = np.sqrt(square + pool * square[square > 0].mean())
    scale[scale == 0] = 1.0  # a column that never occurs keeps weight zero
    return scale


def _principal_axes(problem: PairLoss) -> np.ndarray | None:
    """(F, F') orthonormal eigenvectors of D^T D, F' of F columns occur; None: not worth it."""
    matrix = problem.differences
    if sp.issparse(matrix) or problem.centre or matrix.shape[1] > WIDEST_ROTATED:
        return None
    occurs = matrix.any(0)  # the others' rows stay exactly zero
    axes = np.zeros((len(occurs), occurs.sum()))
    used = matrix[:, occurs]
    axes[occurs] = np.linalg.eigh(used.T @ used)[1]
    return axes


def _divided(matrix, scale: np.ndarray):
    if sp.issparse(matrix):
        return (matrix.astype(np.float64) @ sp.diags(1.0 / scale)).tocsr()
    return matrix.astype(np.float64) / scale
