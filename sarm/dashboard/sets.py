"""Evaluation sets that a page steers: rewards before and after from latents held in memory.

Legend: N conversations, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarm.data import read_records
from sarm.errors import InputError
from sarm.evaluation.benchmarks import REWARD_BENCH_2
from sarm.evaluation.metrics import Benchmark, accuracies
from sarm.evaluation.profiles import LatentSet
from sarm.evaluation.sources import read_suite
from sarm.modeling import SarmForSequenceClassification
from sarm.steering import Heads, SteeringProfile
from sarm.steering.solve import changed_pairs

#: Bins over the unsteered rewards; the axis grows by bins of this width, at most to MOST_BINS.
BINS = 32
MOST_BINS = 128


def read_set(source: str) -> Benchmark:
    """A preference, RM-Bench or RewardBench 2 file, told apart by its first row; `#I/N` as usual.

    Raises:
        FileNotFoundError, InputError: no file, no rows, or rows of the kind it begins with that are
        wrong.
    """
    path = source if Path(source).exists() else source.rpartition("#")[0] or source
    first = next(iter(read_records(path)), None)
    if first is None:
        raise InputError(f"{path}: no items")
    answers = [first.fields.get(side) for side in ("chosen", "rejected")]
    if all(isinstance(a, list) and a and isinstance(a[0], str) for a in answers):
        subset = str(first.fields.get("subset")).lower()  # RM-Bench has the field too
        known = subset in map(str.lower, REWARD_BENCH_2)
        kind = "reward_bench_2" if known else "rm_bench"
    else:
        kind = "preferences"
    return read_suite(**{kind: [source]})[0]


class EvaluationSet:
    """A benchmark's latents, and its rewards and accuracies under the model as it is."""

    def __init__(self, model: SarmForSequenceClassification, latents: LatentSet) -> None:
        self.model, self.latents = model, latents
        self.name = latents.benchmark.name
        self.before = self._rewards(SteeringProfile())
        self.sd = float(self.before.std())
        if not self.sd > 0:
            raise InputError(f"{self.name}: all rewards are {self.before[0]}")
        self.accuracies = self._accuracies(self.before)
        # conversions that are made once, not at a slider's first move
        self._chosen, self._pairs = latents.chosen, latents.pairs
        #: What every page begins with.
        self.unsteered = self.shift(SteeringProfile())

    def about(self) -> dict[str, Any]:
        """What a list of sets shows."""
        items = len(self.latents.benchmark.items)
        return {"name": self.name, "items": items, "responses": len(self.before)}

    def shift(self, profile: SteeringProfile) -> dict[str, Any]:
        """Rewards under a profile beside those without: histogram, means in sd, accuracies.

        Raises:
            InputError: a profile that the model cannot take, or one whose rewards are not finite.
        """
        after = self._rewards(profile)
        if not np.isfinite(after).all():
            raise InputError("profile: makes rewards that are not finite")
        moved, chosen = (after - self.before) / self.sd, self._chosen
        changed = changed_pairs(self._pairs, self.before, after)
        steered = self._accuracies(after)
        return {
            "set": self.name,
            "sd": self.sd,
            "mean": {"before": float(self.before.mean()), "after": float(after.mean())},
            "shift": {
                "all": float(moved.mean()),
                "chosen": float(moved[chosen].mean()),
                "rejected": float(moved[~chosen].mean()),
            },
            "order_changed": float(changed.mean()) if len(changed) else 0.0,
            "moved": float((moved != 0).mean()),
            "accuracies": [
                {"name": name, "before": value, "after": steered[name]}
                for name, value in self.accuracies.items()
            ],
            "histogram": histogram(self.before, after),
        }

    def _rewards(self, profile: SteeringProfile) -> np.ndarray:
        return self.latents.rewards(Heads.of(self.model, [profile]))[:, 0]

    def _accuracies(self, rewards: np.ndarray) -> dict[str, float]:
        benchmark = self.latents.benchmark
        shown = {measure.name for measure in benchmark.measures if not measure.detail}
        found = accuracies(benchmark, rewards[:, None])
        return {name: float(row[0]) for name, row in found.items() if name in shown}


def histogram(before: np.ndarray, after: np.ndarray) -> dict[str, Sequence[float]]:
    """Counts of both in common bins: edges (B + 1,), before (B,), after (B,).

    Bins are those of `before`, so that the axis stays while a slider moves, continued on either
    side to hold `after`; where that would take more than MOST_BINS they become wider.
    """
    low, high = float(before.min()), float(before.max())
    width = (high - low) / BINS
    left = max(0, int(np.ceil((low - after.min()) / width)))
    right = max(0, int(np.ceil((after.max() - high) / width)))
    if BINS + left + right <= MOST_BINS:
        edges = low + width * np.arange(-left, BINS + right + 1)
    else:
        edges = np.linspace(min(low, after.min()), max(high, after.max()), MOST_BINS + 1)
    edges[0] = min(edges[0], low, after.min())  # the rounding of the products above
    edges[-1] = max(edges[-1], high, after.max())
    return {
        "edges": edges.tolist(),
        "before": np.histogram(before, edges)[0].tolist(),
        "after": np.histogram(after, edges)[0].tolist(),
    }
