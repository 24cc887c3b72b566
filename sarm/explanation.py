"""A reward as an exact sum over features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sarm.errors import InputError
from sarm.modeling import SarmForSequenceClassification
from sarm.steering.heads import own_profile
from sarm.steering.nonlinear import Nonlinear, effective
from sarm.tokens import Encoded


@dataclass(frozen=True)
class Contribution:
    """One feature's part of a reward: `activation * weight == value`."""

    feature: int
    activation: float
    weight: float
    value: float


@dataclass(frozen=True)
class Explanation:
    """A reward as an exact sum: `bias + sum(c.value for c in contributions) + rest == reward`.

    contributions: the `top` largest by absolute value.  rest: the sum of the other `n_rest`
    active features.  bias: 0, but for a steered model whose gate is open.  dropped: tokens
    cut from the left to fit max_length.
    """

    reward: float
    bias: float
    contributions: list[Contribution]
    rest: float
    n_rest: int
    n_tokens: int
    dropped: int


@torch.inference_mode()
def explain_state(
    model: SarmForSequenceClassification, state: Tensor, encoded: Encoded, top: int
) -> Explanation:
    """The first reward of one scored token's state (1, d_model), on the model's device."""
    features, activations = _active(model, state)
    logits = model.from_states(state).logits
    assert logits is not None
    reward = logits[0, 0].item()
    weights, bias = model.score.weight[0, features], 0.0
    if steering := own_profile(model):  # clamped activations, and weights that a gate changes
        head = model.score.weight[0].detach()
        program = Nonlinear.of(steering, head)
        activations, weights, bias = effective(program, activations, features, head)
    if not math.isfinite(reward):
        raise InputError(f"conversation: the reward is {reward}")
    values = activations.double() * weights.double()
    order = values.abs().argsort(descending=True, stable=True)
    listed = [
        Contribution(*row)
        for row in zip(
            features[order[:top]].tolist(),
            activations[order[:top]].tolist(),
            weights[order[:top]].tolist(),
            values[order[:top]].tolist(),
            strict=True,
        )
    ]
    return Explanation(
        reward=reward,
        bias=bias,
        contributions=listed,
        rest=values[order[top:]].sum().item(),
        n_rest=max(0, len(order) - top),
        n_tokens=len(encoded.ids),
        dropped=encoded.dropped,
    )


def _active(model: SarmForSequenceClassification, state: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and activations of the latents that make up one state's reward."""
    if model.config.sarm["activation"] != "none":
        vals, idx = (part[0] for part in model.sae.encode(state))
        return idx[vals != 0], vals[vals != 0]  # zeros only fill the row up
    dense = model.sae.preactivations(state)[0]
    return torch.arange(len(dense), device=dense.device), dense
