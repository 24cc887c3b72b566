"""What of a profile is no head weight: clamps and gates, on the latents of one pass.

Legend: N rows, k active latents, P heads, F = n_latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarm import ops
from sarm.steering.profile import Gate, SteeringProfile


@dataclass(frozen=True)
class Nonlinear:
    """One head's clamps and gate.

    head: (F,) its weights where the gate is open.  low, high: (F,) bounds of activations, None
    without clamps.  gate: (F,) the sum's weights, None where it is always open.
    """

    head: Tensor
    low: Tensor | None
    high: Tensor | None
    gate: Tensor | None
    when: Gate | None

    @classmethod
    def of(cls, profile: SteeringProfile, weight: Tensor) -> Nonlinear:
        """For a head (F,) that a profile without gate has already changed, or one with has not."""
        head = profile.head(weight[None])[0] if profile.when else weight.detach()
        low = high = gate = None
        clamps = {j: c for j, c in profile.changes.items() if c.clamps}
        if clamps:
            low = _spread({j: c.low for j, c in clamps.items()}, weight, -math.inf)
            high = _spread({j: c.high for j, c in clamps.items()}, weight, math.inf)
        if profile.when:
            gate = _spread(profile.when.weights, weight, 0.0)
        return cls(head, low, high, gate, profile.when)

    def clamped(self, vals: Tensor, idx: Tensor) -> Tensor:
        """(N, k) activations within their bounds; zeros, which only fill a row up, stay."""
        if self.low is None or self.high is None:
            return vals
        bounded = torch.minimum(torch.maximum(vals, self.low[idx]), self.high[idx])
        return torch.where(vals == 0, vals, bounded)


def steered_rewards(
    vals: Tensor, idx: Tensor, weight: Tensor, programs: Sequence[Nonlinear | None]
) -> Tensor:
    """(N, P) rewards of heads (P, F), some with a program: r + sum_j w_j (clamp(z_j) - z_j), gated.

    All heads, open heads and gates are rows of one `ops.sparse_value`; a clamp costs one more.
    """
    gated = [p for p, program in enumerate(programs) if program and program.gate is not None]
    extra: list[Any] = [row for p in gated for row in _open_and_gate(programs[p])]
    heads = torch.cat([weight, torch.stack(extra)]) if extra else weight
    sums = ops.sparse_value(vals, idx, heads)
    rewards = sums[:, : len(weight)].clone() if extra else sums
    for p, program in enumerate(programs):
        if program is None:
            continue
        at = len(weight) + 2 * gated.index(p) if p in gated else p
        inside = sums[:, at]
        if program.low is not None:
            moved = program.clamped(vals, idx) - vals
            inside = inside + ops.sparse_value(moved, idx, program.head[None])[:, 0]
        if program.when is not None:
            beyond = sums[:, at + 1] - program.when.above
            inside = torch.where(beyond > 0, inside + program.when.slope * beyond, rewards[:, p])
        rewards[:, p] = inside
    return rewards


def effective(
    program: Nonlinear | None, vals: Tensor, idx: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, float]:
    """One row's activations (k,), weights (k,) and constant that its reward is the sum of."""
    weights = weight[idx]
    if program is None:
        return vals, weights, 0.0
    constant = 0.0
    if program.when is not None and program.gate is not None:
        total = ops.sparse_value(vals[None], idx[None], program.gate[None]).item()
        if not total > program.when.above:
            return vals, weights, 0.0
        weights = program.head[idx]
        constant = -program.when.slope * program.when.above
    activations = program.clamped(vals[None], idx[None])[0]
    if program.when is not None and program.gate is not None:
        # slope u_j z_j, with the activation as it is: one weight that gives both parts
        both = weights * activations + program.when.slope * program.gate[idx] * vals
        weights = torch.where(activations == 0, weights, both / activations)
        lost = (both * (activations == 0)).sum().item()  # clamped to zero, but counted by the gate
        constant += lost
    return activations, weights, constant


def _open_and_gate(program: Any) -> tuple[Tensor, Tensor]:
    """Rows of weights of a program with a gate: the head when it is open, and the gate."""
    return program.head, program.gate


def _spread(values: Mapping[int, float], like: Tensor, other: float) -> Tensor:
    """(F,) with the given entries."""
    out = torch.full_like(like, other, dtype=torch.float32)
    if values:
        at = torch.tensor(list(values), device=like.device)
        out[at] = torch.tensor(list(values.values()), dtype=torch.float32, device=like.device)
    return out
