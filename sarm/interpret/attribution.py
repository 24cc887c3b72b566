"""What decided between two answers, feature by feature, in exact sums; and features by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sarm.errors import InputError
from sarm.scorer import Explanation, SARMScorer
from sarm.tokens import Conversation


@dataclass(frozen=True)
class Difference:
    """One feature's part of a margin: `chosen - rejected == value`, all contributions.

    label: what a feature database calls it, if one was asked.
    """

    feature: int
    chosen: float
    rejected: float
    label: str | None = None

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
    scorer: SARMScorer,
    chosen: Conversation,
    rejected: Conversation,
    top: int = 20,
    names: Mapping[int, str] | None = None,
) -> Comparison:
    """The features whose contributions differ most between two answers; `rest` holds the others.

    names: labels of features (`FeatureStore.names`).
    """
    if top < 0:
        raise InputError(f"compare: top must be >= 0, got {top}")
    n_latents = scorer.model.sae.n_latents
    sides = [scorer.explain(side, top=n_latents) for side in (chosen, rejected)]
    return difference(sides[0], sides[1], top, names)


def difference(
    chosen: Explanation,
    rejected: Explanation,
    top: int,
    names: Mapping[int, str] | None = None,
) -> Comparison:
    """The comparison of two explanations that list all their features."""
    names = names or {}
    sides = [named(side, names) for side in (chosen, rejected)]
    values = [{c.feature: c.value for c in side.contributions} for side in sides]
    features = sorted(values[0].keys() | values[1].keys())
    differences = [
        Difference(f, values[0].get(f, 0.0), values[1].get(f, 0.0), names.get(f)) for f in features
    ]
    differences.sort(key=lambda d: (-abs(d.value), d.feature))
    return Comparison(
        chosen=sides[0],
        rejected=sides[1],
        differences=differences[:top],
        rest=sum(d.value for d in differences[top:]),
        n_rest=max(0, len(differences) - top),
    )


def named(explanation: Explanation, names: Mapping[int, str]) -> Explanation:
    """The same explanation with the labels that its features have."""
    if not names:
        return explanation
    listed = [replace(c, label=names.get(c.feature)) for c in explanation.contributions]
    return replace(explanation, contributions=listed)
