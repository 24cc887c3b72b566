"""Several heads on one state: profiles as head weights, and what of them is more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sarm import ops
from sarm.errors import InputError
from sarm.steering.nonlinear import Nonlinear, steered_rewards
from sarm.steering.profile import Profile, SteeringProfile, as_profile

if TYPE_CHECKING:
    from sarm.modeling import SarmForSequenceClassification


def steered(weight: Tensor, profile: Profile | SteeringProfile, where: str = "steer") -> Tensor:
    """A copy of the head weight (P, n_latents) with the profile's features multiplied and added to.

    Raises:
        InputError: not a profile, a feature outside [0, n_latents), a factor that is not finite, or
        a profile that clamps or has a gate, which no head weight can express.
    """
    found = as_profile(profile, where, weight.shape[1])
    if not found.linear:
        raise InputError(f"{where}: a profile with clamp or when is no head weight; use a scorer")
    return found.head(weight)


def profile_heads(
    model: SarmForSequenceClassification, profiles: Sequence[Profile | SteeringProfile]
) -> Tensor:
    """(P, n_latents): the model's first head under each profile; errors as in `steered`."""
    first = model.score.weight[:1]
    found = enumerate(_checked(profiles))
    return torch.cat([steered(first, p, f"profiles[{i}]") for i, p in found])


class Heads:
    """P heads of one model: states (N, d_model) to rewards (N, P) fp32, encoding each state once.

    A column has the bits of a model that has that head alone: `sparse_value` sums every head by
    itself, and without TopK each head is folded and multiplied by itself.

    Args:
        weight: (P, n_latents).  programs: clamps and gate of each head; None: the model's own.
    """

    def __init__(
        self,
        model: SarmForSequenceClassification,
        weight: Tensor,
        programs: Sequence[Nonlinear | None] | None = None,
    ) -> None:
        self.model, self.weight = model, weight.detach().float()
        if programs is None:
            own = own_profile(model)
            programs = [Nonlinear.of(own, w) if own else None for w in self.weight]
        self.programs = list(programs)
        self._sparse = model.config.sarm["activation"] != "none"
        self._folded = [] if self._sparse else [model.folded(head) for head in self.weight.split(1)]

    @classmethod
    def of(
        cls,
        model: SarmForSequenceClassification,
        profiles: Sequence[Profile | SteeringProfile],
    ) -> Heads:
        """The model's first head under each profile.

        Raises:
            InputError: no list of profiles; a profile that is wrong, by its place in the list.
        """
        first, own = model.score.weight[:1].detach().float(), own_profile(model)
        rows, programs = [], []
        for i, profile in enumerate(_checked(profiles)):
            where = f"profiles[{i}]"
            found = as_profile(profile, where, first.shape[1])
            row = first if found.when else found.head(first)
            rest = combined(model, own, found, where)
            rows.append(row)
            programs.append(Nonlinear.of(rest, row[0]) if rest else None)
        return cls(model, torch.cat(rows), programs)

    def __call__(self, states: Tensor) -> Tensor:
        """(N, P) rewards."""
        if self._sparse:
            return self.from_latents(*self.model.sae.encode(states))
        x = self.model.sae.normalize(states)
        return torch.cat([x @ direction.t() + offset for direction, offset in self._folded], dim=1)

    def from_latents(self, vals: Tensor, idx: Tensor) -> Tensor:
        """(N, P) rewards of active latents (N, k) fp32 and their indices (N, k)."""
        if not any(self.programs):
            return ops.sparse_value(vals, idx, self.weight)
        return steered_rewards(vals, idx, self.weight, self.programs)


def own_profile(model: SarmForSequenceClassification) -> SteeringProfile | None:
    """The clamps and gate that a model carries in its config, if any."""
    from sarm.steering.files import profile_from_fields

    section = model.config.sarm.get("steering")
    return profile_from_fields(section, "config: sarm.steering") if section else None


def combined(
    model: SarmForSequenceClassification,
    own: SteeringProfile | None,
    profile: SteeringProfile,
    where: str,
) -> SteeringProfile | None:
    """What a model's own program and a profile leave beside the head weight.

    Raises:
        InputError: both clamp or have a gate, or the model is linear in all latents.
    """
    if profile.linear:
        return own
    if own is not None:
        raise InputError(
            f"{where}: the model already carries clamps or a gate; steer the original with one "
            "profile that says it all"
        )
    if model.config.sarm["activation"] == "none":
        raise InputError(
            f"{where}: clamp and when need active latents; this model is linear in all of them"
        )
    return profile


def _checked(profiles):
    if isinstance(profiles, (Mapping, str)) or not isinstance(profiles, Sequence) or not profiles:
        got = type(profiles).__name__ if profiles or isinstance(profiles, Mapping) else "none"
        raise InputError(f"profiles: expected a list of profiles, got {got}")
    return profiles
