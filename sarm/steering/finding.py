"""Finding the features of a domain: the published contrast score, and how stable its choice is.

    s_j = (c_j - r_j) / (c_j + r_j + mean(c + r))

c and r are feature j's activations at the scored token, summed over the chosen and the rejected
answers of a domain (arXiv 2508.08746).

Legend: N conversations, F latents, G prompts, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from sarm.errors import InputError

RESAMPLES = 500


@dataclass(frozen=True)
class Contrast:
    """The score of every feature and its stability over resampled prompts; all (F,).

    score: s_j.  low, high: 95 % interval of s_j.  rank: 1 for the largest score.  rank_low,
    rank_high: 95 % interval of the rank.  selected: share of resamples in which the feature is
    among the `top` ones.  agreement: mean Spearman correlation of a resample's scores of active
    features with the full ones.
    """

    score: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rank: np.ndarray
    rank_low: np.ndarray
    rank_high: np.ndarray
    selected: np.ndarray
    agreement: float
    top: int

    def stable(self, share: float) -> np.ndarray:
        """Features with a positive score among the `top` in this share of resamples, best first."""
        order = np.argsort(-self.score, kind="stable")
        keep = (self.selected[order] >= share) & (self.score[order] > 0)
        return order[keep]


def contrast(
    activations: sp.csr_matrix,
    chosen: np.ndarray,
    groups: np.ndarray,
    *,
    top: int = 10,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Contrast:
    """Contrast scores of all features, with bootstrap over prompts.

    Args:
        activations: (N, F).  chosen: (N,) bool.  groups: (N,) prompt of each conversation.
    Raises:
        InputError: no chosen or no rejected answers, fewer than 2 prompts, no activation at all.
    """
    if not chosen.any() or chosen.all():
        raise InputError("contrast: needs chosen and rejected answers")
    number = np.unique(groups, return_inverse=True)[1]
    n_groups, n_latents = int(number.max()) + 1, activations.shape[1]
    if n_groups < 2:
        raise InputError(f"contrast: needs at least 2 prompts, got {n_groups}")
    if not activations.count_nonzero():  # nnz counts the zeros that fill rows up
        raise InputError("contrast: no feature is active")
    if not 1 <= top <= n_latents:
        raise InputError(f"contrast: top must be in [1, {n_latents}], got {top}")
    sums = [_by_group(activations, number, chosen == side, n_groups) for side in (True, False)]
    score = contrast_score(*(np.asarray(part.sum(0)).ravel() for part in sums))
    active = np.flatnonzero(np.asarray((sums[0] + sums[1]).sum(0)).ravel())
    rank = _ranks(score)
    draw = np.random.default_rng(seed)
    replicates = np.empty((resamples, n_latents), np.float32)
    ranks = np.empty((resamples, n_latents), np.int32)
    agreement = np.empty(resamples)
    among = rankdata(score[active])
    for b in range(resamples):
        times = np.bincount(draw.integers(0, n_groups, n_groups), minlength=n_groups)
        replicates[b] = contrast_score(*(part.T @ times for part in sums))
        ranks[b] = _ranks(replicates[b])
        agreement[b] = _correlation(rankdata(replicates[b][active]), among)
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    rank_low, rank_high = np.quantile(ranks, [0.025, 0.975], axis=0)
    selected = (ranks <= top).mean(0)
    return Contrast(
        score, low, high, rank, rank_low, rank_high, selected, float(agreement.mean()), top
    )


def contrast_score(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(F,) scores of summed activations (F,); 0 where both are 0."""
    total = chosen + rejected
    scale = total + total.mean()  # 0 where a resample holds no activation at all
    return np.divide(chosen - rejected, scale, out=np.zeros(len(scale)), where=scale > 0)


def _by_group(activations, number: np.ndarray, rows: np.ndarray, n_groups: int) -> sp.csr_matrix:
    at = np.flatnonzero(rows)
    where = (np.ones(len(at)), (number[at], at))
    return (sp.csr_matrix(where, shape=(n_groups, len(rows))) @ activations).tocsr()


def _ranks(score: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(score), np.int64)
    ranks[np.argsort(-score, kind="stable")] = np.arange(1, len(score) + 1)
    return ranks


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
