"""For every feature the occurrences with the largest keys, in arrays of fixed size.

With the activation as the key they are the top contexts; with a hash of the occurrence, a uniform
random sample without replacement that depends on no generator's state, so that a run that was cut
and resumed keeps the same ones.

    F  features    S  slots of each    C  occurrences offered
"""

from __future__ import annotations

import numpy as np

EMPTY = np.iinfo(np.int64).max  # the occurrence of a free slot: later than any other


class BestOccurrences:
    """key (F, S) fp64 and occurrence (F, S) int64; an occurrence keeps its slot while it is in."""

    def __init__(self, features: int, slots: int) -> None:
        self.key = np.full((features, slots), -np.inf)
        self.occurrence = np.full((features, slots), EMPTY)

    def offer(
        self, feature: np.ndarray, key: np.ndarray, occurrence: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take what is among the best; equal keys: the earlier occurrence.

        Args:
            feature, key, occurrence: (C,) each; occurrences ascend with time.
        Returns:
            (indices into C, slots) of those that are in now; others have left their slots.
        """
        slots = self.key.shape[1]
        offered = np.flatnonzero(key > self.key.min(axis=1)[feature])
        touched = np.unique(feature[offered])
        here = len(touched) * slots  # what is in already comes first in the arrays below
        features = np.concatenate([np.repeat(touched, slots), feature[offered]])
        keys = np.concatenate([self.key[touched].ravel(), key[offered]])
        occurrences = np.concatenate([self.occurrence[touched].ravel(), occurrence[offered]])
        order = np.lexsort((occurrences, -keys, features))
        starts = np.searchsorted(features[order], touched)
        counts = np.diff([*starts, len(order)])
        rank = np.arange(len(order)) - np.repeat(starts, counts)
        stays = np.zeros(len(order), bool)
        stays[order] = rank < slots
        # as many leave a feature as come in, so both lists, by feature, match one to one
        left = np.flatnonzero(~stays[:here])
        new = here + np.flatnonzero(stays[here:])
        new = new[np.lexsort((occurrences[new], features[new]))]
        rows, cells = features[left], left % max(1, slots)
        self.key[rows, cells], self.occurrence[rows, cells] = keys[new], occurrences[new]
        return offered[new - here], cells


def uniform(occurrence: np.ndarray, feature: np.ndarray, seed: int) -> np.ndarray:
    """A key in [0, 1) for every (occurrence, feature), as good as random (splitmix64)."""
    with np.errstate(over="ignore"):
        x = occurrence.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x ^= (feature.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        x += np.uint64(seed) * np.uint64(0x94D049BB133111EB)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
