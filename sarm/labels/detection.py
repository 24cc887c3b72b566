"""Detection: how well a label tells a feature's contexts from others.

Balanced accuracy is the mean of sensitivity (activating contexts recognised) and specificity
(others recognised): 0.5 is chance, whatever the number of either. Its 95 % interval is
Newcombe's square-and-add of the two Wilson intervals: with ten contexts of each class the normal
approximation would report no uncertainty at all for a perfect score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

#: Standard normal quantile of a two-sided 95 % interval.
Z = 1.959963984540054


@dataclass(frozen=True)
class Detection:
    """Counts of judged held-out contexts; `unjudged` ones had no readable answer."""

    hits: int
    positives: int
    rejections: int
    negatives: int
    unjudged: int = 0

    @property
    def accuracy(self) -> float | None:
        """Balanced accuracy; None without a judged context of either class."""
        if not self.positives or not self.negatives:
            return None
        return (self.hits / self.positives + self.rejections / self.negatives) / 2

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of `accuracy`, 95 %."""
        if not self.positives or not self.negatives:
            return None
        ends = []
        for end in (0, 1):
            squares = 0.0
            for count, of in ((self.hits, self.positives), (self.rejections, self.negatives)):
                squares += (count / of - wilson(count, of)[end]) ** 2
            ends.append(math.sqrt(squares) / 2)
        middle = self.accuracy or 0.0
        return max(0.0, middle - ends[0]), min(1.0, middle + ends[1])

    def details(self) -> dict:
        """As stored with a label."""
        interval = self.interval
        return {**asdict(self), "interval": None if interval is None else list(interval)}


def judged(answers: Iterable[tuple[bool, bool | None]]) -> Detection:
    """From (is active, was said to be active; None: no answer) of every context."""
    answers = list(answers)
    of = {truth: [said for is_so, said in answers if is_so == truth] for truth in (True, False)}
    known = {truth: [s for s in said if s is not None] for truth, said in of.items()}
    return Detection(
        hits=sum(known[True]),
        positives=len(known[True]),
        rejections=len(known[False]) - sum(known[False]),
        negatives=len(known[False]),
        unjudged=len(answers) - len(known[True]) - len(known[False]),
    )


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    p, z2 = count / of, Z * Z
    middle = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = Z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    return middle - half, middle + half
