"""The value head: a convex problem over frozen features, solved to its optimum.

Bradley-Terry with an L2 penalty, over feature differences  D = F(chosen) - F(rejected)  (M, F):

    minimise over w   mean_i log(1 + exp(-D_i w))  +  l2/2 * ||s * w||^2

where s_j^2 = (mean square of column j) + pool * (mean of that over all columns that occur). With
pool = 0 the fit does not depend on the columns' scales: right for dense features. Sparse features
want pool = 1 (`SPARSE_POOL`): a latent that hardly differs in training would otherwise get a huge
weight for fitting one pair, which explodes on a new answer where the latent is active. No
intercept: it cancels in differences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import expit

from sarm.errors import InputError

SPARSE_POOL = 1.0
L2_GRID = tuple(float(x) for x in np.logspace(-4, 1, 11))


@dataclass(frozen=True)
class HeadFit:
    """The optimum and how it was reached.

    weight: (F,) in the units of the features.  loss: of the training pairs, without penalty.
    gradient_norm: largest absolute component at the optimum, in scaled units.
    cv: mean held-out log loss for every l2 that was tried (empty without cross-validation).
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
) -> HeadFit:
    """Fit the head; with l2=None its strength is chosen by cross-validation.

    Args:
        differences: (M, F) features of chosen minus rejected, scipy CSR or numpy.
        l2: penalty; None: the best held-out log loss over `L2_GRID`.
        groups: (M,) prompt of each pair; folds never split a prompt.
        pool: how much of the columns' common scale the penalty uses, see the top.
    Raises:
        InputError: fewer than 2 pairs, non-finite features, no pair that differs, or l2=None with
        pairs of a single prompt.
    """
    started = time.perf_counter()
    if differences.shape[0] < 2:
        raise InputError(f"fit_head: needs at least 2 pairs, got {differences.shape[0]}")
    data = differences.data if sp.issparse(differences) else differences
    if not np.isfinite(data).all():
        raise InputError("fit_head: features hold NaN or infinite values")
    if not np.any(data):
        raise InputError("fit_head: chosen and rejected have equal features in every pair")
    cv: dict[float, float] = {}
    if l2 is None:
        cv = cross_validate(differences, groups, folds, pool)
        l2 = min(cv, key=lambda value: (cv[value], -value))
    elif not l2 > 0:
        raise InputError(f"fit_head: l2 must be positive, got {l2}")
    scaled, scale = _scale(differences, pool)
    result = _solve(scaled, l2, np.zeros(scaled.shape[1]))
    margins = scaled @ result.x
    return HeadFit(
        weight=result.x / scale,
        l2=l2,
        loss=float(np.logaddexp(0, -margins).mean()),
        accuracy=pair_accuracy(margins),
        gradient_norm=float(np.abs(result.jac).max()),
        iterations=int(result.nit),
        seconds=time.perf_counter() - started,
        cv=cv,
    )


def cross_validate(
    differences, groups: Sequence | None, folds: int, pool: float = 0.0
) -> dict[float, float]:
    """Mean held-out log loss of every l2 in `L2_GRID`; strong penalties first, warm-started."""
    fold_of = assign_folds(groups if groups is not None else range(differences.shape[0]), folds)
    if not fold_of.any():
        raise InputError("fit_head: cross-validation needs pairs of 2 prompts or more; give an l2")
    scaled, _ = _scale(differences, pool)
    losses: dict[float, float] = dict.fromkeys(L2_GRID, 0.0)
    for fold in np.unique(fold_of):
        train, test = scaled[fold_of != fold], scaled[fold_of == fold]
        weight = np.zeros(scaled.shape[1])
        for l2 in sorted(L2_GRID, reverse=True):
            weight = _solve(train, l2, weight, tolerance=1e-5).x
            losses[l2] += float(np.logaddexp(0, -(test @ weight)).sum()) / scaled.shape[0]
    return losses


def assign_folds(groups: Sequence, folds: int, seed: int = 0) -> np.ndarray:
    """(M,) fold of each row; rows of one group share a fold."""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[g]: i % min(folds, len(names)) for i, g in enumerate(order)}
    return np.array([fold_of[g] for g in groups])


def pair_accuracy(margins: np.ndarray) -> float:
    """Share of pairs with a positive margin; a tie counts a half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def _scale(differences, pool: float = 0.0):
    """D with every column divided by its scale s_j (see the top), and the scales."""
    rows = differences.shape[0]
    if sp.issparse(differences):
        square = np.asarray(differences.multiply(differences).sum(axis=0)).ravel() / rows
    else:
        square = np.square(differences, dtype=np.float64).mean(axis=0)
    scale = np.sqrt(square + pool * square[square > 0].mean())
    scale[scale == 0] = 1.0  # a column that never occurs keeps weight zero
    if sp.issparse(differences):
        return (differences.astype(np.float64) @ sp.diags(1.0 / scale)).tocsr(), scale
    return differences.astype(np.float64) / scale, scale


def _solve(scaled, l2: float, start: np.ndarray, tolerance: float = 1e-8):
    rows = scaled.shape[0]
    transposed = scaled.T.tocsr() if sp.issparse(scaled) else scaled.T

    def objective(weight: np.ndarray) -> tuple[float, np.ndarray]:
        margins = scaled @ weight
        loss = np.logaddexp(0, -margins).mean() + 0.5 * l2 * weight @ weight
        gradient = -(transposed @ expit(-margins)) / rows + l2 * weight
        return loss, gradient

    return minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0, "maxcor": 20},
    )
