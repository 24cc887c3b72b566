"""What a steering profile says, apart from where it is written.

With w_j the head's weight and z_j the activation of an active feature j, its part of the reward
becomes

    (multiply_j w_j + add_j) clamp(z_j, low_j, high_j)          ablate: multiply 0

A feature that is not active has z_j = 0 and stays out of the sum whatever its clamp says: the
reward remains a sum over the k active features. With a gate g = sum_j u_j z_j (`when`) all of this,
and slope (g - above) on top, applies only where g > above; elsewhere the reward is the model's own.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sarm.errors import InputError

Profile = Mapping[int, float]
"""The short form: {feature: factor}."""


@dataclass(frozen=True)
class Change:
    """What happens to one feature; multiply and add act on the head's weight, clamp on z."""

    multiply: float = 1.0
    add: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamps(self) -> bool:
        """Whether the activation is bounded on either side."""
        return self.low > -math.inf or self.high < math.inf


@dataclass(frozen=True)
class Gate:
    """Open where sum_j weights[j] z_j > above (conditional steering, arXiv 2409.05907).

    slope: reward added for every unit of the sum beyond `above`, so that the reward is continuous
    where the gate opens.
    """

    weights: Mapping[int, float]
    above: float
    slope: float = 0.0


@dataclass(frozen=True)
class SteeringProfile:
    """Changes by feature, and when they apply (None: always).

    model: fingerprint of the features they speak of (`sarm.features.identity`), None: unchecked.
    """

    changes: Mapping[int, Change] = field(default_factory=dict)
    when: Gate | None = None
    name: str = ""
    description: str = ""
    model: str | None = None

    @property
    def linear(self) -> bool:
        """Whether it is only another head weight."""
        return self.when is None and not any(c.clamps for c in self.changes.values())

    def head(self, weight: Tensor) -> Tensor:
        """A copy of head weights (P, n_latents) with multiply and add applied."""
        weight = weight.detach().clone()
        changed = [(j, c) for j, c in self.changes.items() if (c.multiply, c.add) != (1.0, 0.0)]
        if changed:
            at = torch.tensor([j for j, _ in changed], device=weight.device)
            rows = [[c.multiply for _, c in changed], [c.add for _, c in changed]]
            multiply, add = torch.tensor(rows, dtype=weight.dtype, device=weight.device)
            weight[:, at] = weight[:, at] * multiply + add
        return weight

    def check_features(self, n_latents: int, where: str) -> SteeringProfile:
        """The profile itself, or InputError where it names a feature that does not exist."""
        for feature in (*self.changes, *(self.when.weights if self.when else ())):
            if not 0 <= feature < n_latents:
                raise InputError(f"{where}: feature must be in [0, {n_latents}), got {feature}")
        return self


def as_profile(profile: Profile | SteeringProfile, where: str, n_latents: int) -> SteeringProfile:
    """Either form as a checked `SteeringProfile`.

    Raises:
        InputError: neither form, a feature outside [0, n_latents) or a factor that is not finite.
    """
    if isinstance(profile, SteeringProfile):
        return profile.check_features(n_latents, where)
    if not isinstance(profile, Mapping):
        got = type(profile).__name__
        raise InputError(f"{where}: expected a mapping of features to factors, got {got}")
    changes: dict[int, Change] = {}
    for feature, factor in profile.items():
        try:
            index = operator.index(feature)  # numpy's integers too
        except TypeError:
            raise InputError(f"{where}: features are integers, got {feature!r}") from None
        if isinstance(feature, bool):
            raise InputError(f"{where}: features are integers, got {feature!r}")
        if not 0 <= index < n_latents:
            raise InputError(f"{where}: feature must be in [0, {n_latents}), got {feature}")
        if not isinstance(factor, numbers.Real) or not math.isfinite(factor):
            raise InputError(
                f"{where}: the factor of feature {feature} must be a finite number, got {factor!r}"
            )
        changes[index] = Change(multiply=float(factor))
    return SteeringProfile(changes)
