"""Newton's method for heads that share their pairs: the folds of a cross-validation in one go.

    for every column c:  minimise over w_c   f_c(w_c)  +  l2/2 * ||w_c||^2

f_c is `PairLoss` with pairs weighted by column c of the shares: a fold leaves its own pairs out.
Newton's equation is solved by conjugate gradients, only as exactly as the step deserves (Dembo and
Steihaug 1983). All columns pass over D together, and D is what takes the time: it is read from
memory once instead of once a fold. The line search needs no pass at all, rewards are linear in t.

    M  pairs    F  features    C  columns (problems)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sarm.errors import InputError
from sarm.training.pair_loss import PairLoss

MOST_STEPS, MOST_PRODUCTS = 200, 1000


@dataclass(frozen=True)
class Minimum:
    """weight (F, C); gradient_norm, the largest absolute component in any column; Newton steps."""

    weight: np.ndarray
    gradient_norm: float
    steps: int


def minimise(
    problem: PairLoss,
    l2: float,
    start: np.ndarray,
    shares: np.ndarray | None = None,
    tolerance: float = 1e-8,
) -> Minimum:
    """The optimum of every column, from start (F, C), to a gradient of at most `tolerance`.

    Args:
        l2: > 0, which makes the minimum the only one.
        shares: (M, C) weight of each pair in each problem, >= 0, columns sum to 1; None: 1 / M.
    Raises:
        InputError: no minimum was found (features of absurd size).
    """
    if shares is None:
        shares = np.full((problem.shape[0], start.shape[1]), 1 / problem.shape[0])
    weight = start.copy()
    margins, totals = problem.products(weight)
    likely = problem.mean_squares()[:, None]
    for step in range(MOST_STEPS):
        slope, bend = problem.slopes(margins, totals, shares)
        gradient = problem.pulled(*slope) + l2 * weight
        norm = float(np.abs(gradient).max())
        if norm <= tolerance:
            return Minimum(weight, norm, step)

        def curved(direction: np.ndarray, bend=bend) -> np.ndarray:
            along, sums = problem.products(direction)
            return problem.pulled(bend[0] * along, bend[1] * sums) + l2 * direction

        enough = max(min(0.3, norm**0.5), 0.3 * tolerance / norm)
        scale = bend[0].sum(0) * likely + l2  # near the Hessian's diagonal, without a pass
        direction = conjugate_gradients(curved, -gradient, scale, enough)
        along = problem.products(direction)
        taken = _line_search(problem, l2, (weight, margins, totals), (direction, *along), shares)
        weight = weight + taken * direction
        margins, totals = margins + taken * along[0], totals + taken * along[1]
    raise InputError(f"fit_head: no optimum after {MOST_STEPS} steps, gradient {norm:.1e}")


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    right: np.ndarray,
    scale: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """x (F, C) with product(x) = right to a relative residual, every column by itself.

    product: of a positive definite matrix, whose diagonal is about scale (F, C).
    """
    x = np.zeros_like(right)
    rest = right.copy()
    enough = tolerance * np.linalg.norm(right, axis=0)
    way = rest / scale
    before = np.einsum("fc,fc->c", rest, way)
    for _ in range(MOST_PRODUCTS):
        open_ = np.linalg.norm(rest, axis=0) > enough
        if not open_.any():
            break
        pushed = product(way)
        # a column that is done stays where it is: its numbers would only become rounding errors
        length = np.where(open_, before, 0) / np.where(open_, np.einsum("fc,fc->c", way, pushed), 1)
        x += length * way
        rest -= length * pushed
        eased = rest / scale
        after = np.einsum("fc,fc->c", rest, eased)
        way = eased + np.where(open_, after, 0) / np.where(open_, before, 1) * way
        before = after
    return x


def _line_search(problem, l2: float, at: tuple, along: tuple, shares: np.ndarray) -> np.ndarray:
    """(C,) step lengths: 1, halved until the objective has not grown and hardly rises any more."""
    (weight, *products), (direction, *changes) = at, along

    def slope_and_value(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved = [p + t * c for p, c in zip(products, changes, strict=True)]
        own = weight + t * direction
        value = problem.values(*moved, shares) + 0.5 * l2 * np.square(own).sum(0)
        slopes, _ = problem.slopes(*moved, shares)
        rise = sum((s * c).sum(0) for s, c in zip(slopes, changes, strict=True))
        return rise + l2 * (own * direction).sum(0), value

    taken = np.ones(direction.shape[1])
    slope, value = slope_and_value(np.zeros_like(taken))
    for _ in range(50):
        rise, new = slope_and_value(taken)
        # 1e-12: values are rounded; next to the optimum the slope alone can tell
        bad = (rise > 0.5 * np.abs(slope)) | (new > value + 1e-12 * np.abs(value))
        if not bad.any():
            break
        taken = np.where(bad, taken / 2, taken)
    return taken
