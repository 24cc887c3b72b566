"""A change of the head that moves a domain and little else, in closed form.

Multiplying a domain's features moves every response in which they are active, and with a few
thousand latents none is silent elsewhere. So the off-target sets take part in the choice of the
change d to the head weight:

    minimise  d'(W + a V + ridge) d   subject to   mean_target(z) d = shift,
                                                   mean_off(z) d = 0 for every off-target set
    W: second moment of within-prompt differences off target (what changes rankings)
    V: covariance over target answers (a shift that all of them share carries over)

Legend: N conversations, F latents, M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from sarm.errors import InputError

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


def changed_pairs(pairs: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(M,) 1 where a pair's order is another one than before, ties being an order of their own."""
    c, r = pairs[:, 0], pairs[:, 1]
    return (np.sign(before[c] - before[r]) != np.sign(after[c] - after[r])).astype(float)


def _differences(one: LatentSet) -> sp.csr_matrix:
    """(M, F) chosen minus rejected of every pair."""
    return one.matrix[one.pairs[:, 0]] - one.matrix[one.pairs[:, 1]]


def _second_moment(matrix: sp.csr_matrix) -> np.ndarray:
    return (matrix.T @ matrix).toarray() / matrix.shape[0]
