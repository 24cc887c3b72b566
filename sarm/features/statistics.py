"""Sums over responses from which every feature's statistics follow; exact to add up and resume.

R  responses of a block    k  active features of each    F  features    N  responses so far
"""

from __future__ import annotations

import json

import numpy as np

#: Edges of the histograms: half octaves from 2^-12 to 2^12; the outer bins take what lies beyond.
EDGES = 2.0 ** np.arange(-12.0, 12.5, 0.5)
#: Per feature, summed over responses: count, z, z^2, z log(1 + length), z log(1 + marks), z of
#: chosen and of rejected responses.
SUMS = ("rows", "z", "zz", "z_length", "z_marks", "chosen", "rejected")
#: Over all responses: their number, tokens, cut ones, pairs' sides, and the moments of the style.
TOTALS = (
    "rows", "tokens", "truncated", "chosen", "rejected", "reward",
    "length", "length_squared", "marks", "marks_squared",
)  # fmt: skip


class Statistics:
    """Accumulated in fp64, a block at a time, in the order of the responses."""

    def __init__(self, features: int) -> None:
        self.sums = np.zeros((len(SUMS), features))
        self.largest = np.full(features, -np.inf)
        self.histogram = np.zeros((features, len(EDGES) - 1), np.int64)
        self.negative = np.zeros(features, np.int64)
        self.totals = np.zeros(len(TOTALS))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a resumed run goes on from, by name; written to in place."""
        return dict(vars(self))

    def add(
        self,
        idx: np.ndarray,
        vals: np.ndarray,
        length: np.ndarray,
        marks: np.ndarray,
        side: np.ndarray,
        totals: dict[str, float],
    ) -> None:
        """Add a block.

        Args:
            idx, vals: (R, k) active features at the scored token; a value of 0 fills a row up.
            length, marks: (R,) characters and marks of markdown of the response.
            side: (R,) 1: chosen, -1: rejected, 0: neither.
            totals: what to add to tokens, truncated and reward.
        """
        features = len(self.largest)
        row, column = np.nonzero(vals)
        which, z = idx[row, column], vals[row, column].astype(np.float64)
        style = np.log1p(np.stack([length, marks]).astype(np.float64))
        weights = [np.ones_like(z), z, z * z, z * style[0][row], z * style[1][row]]
        weights += [z * (side[row] == 1), z * (side[row] == -1)]
        for total, weight in zip(self.sums, weights, strict=True):
            total += np.bincount(which, weight, features)
        np.maximum.at(self.largest, which, z)
        positive = z > 0
        octave = np.searchsorted(EDGES, z[positive], side="right") - 1
        np.add.at(self.histogram, (which[positive], octave.clip(0, len(EDGES) - 2)), 1)
        self.negative += np.bincount(which[~positive], minlength=features)
        more = {
            "rows": len(vals),
            "chosen": (side == 1).sum(),
            "rejected": (side == -1).sum(),
            "length": style[0].sum(),
            "length_squared": (style[0] ** 2).sum(),
            "marks": style[1].sum(),
            "marks_squared": (style[1] ** 2).sum(),
        } | totals
        self.totals += [more[name] for name in TOTALS]

    def total(self, name: str) -> float:
        """One of `TOTALS`."""
        return float(self.totals[TOTALS.index(name)])

    def table(self, weight: np.ndarray) -> list[tuple]:
        """Rows of the database's table `feature`, head weights (F,) given."""
        n = max(1.0, self.total("rows"))
        rows, z, zz, z_length, z_marks, chosen, rejected = self.sums
        mean = np.divide(z, rows, out=np.zeros_like(z), where=rows > 0)
        largest = np.where(rows > 0, self.largest, 0.0)
        columns = [rows.astype(np.int64), rows / n, mean, largest, weight, weight * z / n]
        if self.total("chosen") and self.total("rejected"):
            columns += [chosen, rejected, contrast(chosen, rejected)]
        else:
            columns += [np.full(len(z), np.nan)] * 3
        for name, mixed in (("length", z_length), ("marks", z_marks)):
            columns.append(self._correlation(z, zz, mixed, name, n))
        lists = [column.tolist() for column in columns]
        return [
            (i, *(None if value != value else value for value in row), self._histogram(i))
            for i, row in enumerate(zip(*lists, strict=True))
        ]

    def _correlation(
        self, z: np.ndarray, zz: np.ndarray, mixed: np.ndarray, name: str, n: float
    ) -> np.ndarray:
        """Pearson's, over all responses; NaN where either side does not vary."""
        total, squared = self.total(name), self.total(f"{name}_squared")
        covariance = mixed / n - (z / n) * (total / n)
        spread = squared / n - (total / n) ** 2
        variance = zz / n - (z / n) ** 2
        # a constant's variance comes out as rounding of its square
        known = (variance > 1e-12 * zz / n) & (spread > 1e-12 * squared / n)
        product = np.sqrt(np.where(known, variance * spread, 1.0))
        return np.where(known, (covariance / product).clip(-1, 1), np.nan)

    def _histogram(self, feature: int) -> str:
        counts = self.histogram[feature]
        used = np.flatnonzero(counts)
        low, high = (used[0], used[-1] + 1) if len(used) else (0, 0)
        edges = EDGES[low : high + 1].tolist() if len(used) else []
        return json.dumps(
            {
                "edges": edges,
                "counts": counts[low:high].tolist(),
                "negative": int(self.negative[feature]),
            }
        )


def contrast(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """s = (c - j) / (c + j + mean(c + j)), c and j a feature's summed activations; 0 for 0 / 0.

    The mean is over all features. Source: the SARM paper, arXiv 2508.08746.
    """
    both = chosen + rejected
    below = both + both.mean()
    return np.divide(chosen - rejected, below, out=np.zeros_like(both), where=below != 0)
