"""Pairs whose label contradicts the features: candidates for a wrong label.

A head is fitted on the pairs' own features, prompts held out fold by fold; a pair's margin comes
from the fold that did not see its prompt. With p = sigmoid(margin) the probability the features
give to the label, a negative margin says they would have it the other way round. (Confident
learning, arXiv 1911.00068, ranks labels by the same out-of-fold self-confidence.)

Legend: M pairs, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from sarm.errors import InputError
from sarm.evaluation.profiles import LatentSet
from sarm.training.head import SPARSE_POOL, assign_folds, fit_head


@dataclass(frozen=True)
class Suspect:
    """One pair: its place, out-of-fold margin and the label's probability.

    features: the (feature, part) that speak most against the label; parts sum to the margin over
    all features.
    """

    where: str
    margin: float
    probability: float
    features: list[tuple[int, float]]


@dataclass(frozen=True)
class PreferenceAudit:
    """margins: (M,) out of fold, in the file's order.  suspects: worst first."""

    margins: np.ndarray
    suspects: list[Suspect]
    accuracy: float
    l2: float


def audit_preferences(
    pairs: LatentSet, *, folds: int = 5, l2: float | None = None, top: int = 5
) -> PreferenceAudit:
    """Every pair with a negative out-of-fold margin, ranked, with the features that decide.

    Args:
        pairs: items of one chosen and one rejected answer.  l2: of the head; None: the best by
            cross-validation over all pairs.  top: features named for each suspect.
    Raises:
        InputError: items that are no pairs, or fewer than 2 prompts.
    """
    items = pairs.benchmark.items
    if len(pairs.pairs) != len(items):
        raise InputError("audit preferences: needs one chosen and one rejected answer in each item")
    difference = (pairs.matrix[pairs.pairs[:, 0]] - pairs.matrix[pairs.pairs[:, 1]]).tocsr()
    groups = pairs.item_groups.tolist()
    if len(set(groups)) < 2:
        raise InputError("audit preferences: needs pairs of at least 2 prompts")
    if l2 is None:
        l2 = fit_head(difference, groups=groups, pool=SPARSE_POOL).l2
    fold_of = assign_folds(groups, folds)
    margins = np.empty(len(items))
    weights = {}
    for fold in np.unique(fold_of):
        held = fold_of == fold
        weights[fold] = fit_head(difference[~held], l2=l2, pool=SPARSE_POOL).weight
        margins[held] = difference[held] @ weights[fold]
    suspects = []
    for i in np.argsort(margins, kind="stable"):
        if margins[i] >= 0:
            break
        row = difference[i]
        parts = row.data * weights[fold_of[i]][row.indices]
        worst = np.argsort(parts, kind="stable")[:top]
        named = [(int(row.indices[j]), float(parts[j])) for j in worst if parts[j] < 0]
        margin = float(margins[i])
        suspects.append(Suspect(items[i].where, margin, float(expit(margin)), named))
    accuracy = float(np.mean((margins > 0) + 0.5 * (margins == 0)))
    return PreferenceAudit(margins, suspects, accuracy, l2)
