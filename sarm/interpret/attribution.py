"""What decided between two answers, feature by feature, in exact sums."""

from __future__ import annotations

from dataclasses import dataclass

from sarm.errors import InputError
from sarm.scorer import Explanation, SARMScorer
from sarm.tokens import Conversation


@dataclass(frozen=True)
class Difference:
    """One feature's part of a margin: `chosen - rejected == value`, all contributions."""

    feature: int
    chosen: float
    rejected: float

    @property
    def value(self) -> float:
        """The feature's part of the margin."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Comparison:
    """A margin as an exact sum: `sum(d.value for d in differences) + rest == margin`."""

    chosen: Explanation
    rejected: Explanation
    differences: list[Difference]
    rest: float
    n_rest: int

    @property
    def margin(self) -> float:
        """Reward of the chosen answer minus that of the rejected one."""
        return self.chosen.reward - self.rejected.reward


def compare(
    scorer: SARMScorer, chosen: Conversation, rejected: Conversation, top: int = 20
) -> Comparison:
    """The features whose contributions differ most between two answers; `rest` holds the others."""
    if top < 0:
        raise InputError(f"compare: top must be >= 0, got {top}")
    n_latents = scorer.model.sae.n_latents
    sides = [scorer.explain(side, top=n_latents) for side in (chosen, rejected)]
    values = [{c.feature: c.value for c in side.contributions} for side in sides]
    features = sorted(values[0].keys() | values[1].keys())
    differences = [Difference(f, values[0].get(f, 0.0), values[1].get(f, 0.0)) for f in features]
    differences.sort(key=lambda d: (-abs(d.value), d.feature))
    return Comparison(
        chosen=sides[0],
        rejected=sides[1],
        differences=differences[:top],
        rest=sum(d.value for d in differences[top:]),
        n_rest=max(0, len(differences) - top),
    )
