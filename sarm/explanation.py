"""A reward as an exact sum over features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """One feature's part of a reward: `activation * weight == value`.

    label: what a feature database calls it, if one was asked.
    """

    feature: int
    activation: float
    weight: float
    value: float
    label: str | None = None


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


def explain_state(
    model: SarmForSequenceClassification, state: Tensor, encoded: Encoded, top: int
) -> Explanation:
    """The first reward of one scored token's state (1, d_model), on the model's device."""
    return explain_states(model, state, [encoded], top)[0]


@torch.inference_mode()
def explain_states(
    model: SarmForSequenceClassification,
    states: Tensor,
    encoded: Sequence[Encoded],
    top: int,
    where: Callable[[int], str] = lambda i: "conversation",
) -> list[Explanation]:
    """The first reward of every state (N, d_model), on the model's device; encoded once.

    Contributions are products in fp64 of fp32 numbers, exact; the reward is their sum in fp32.
    With n active features they differ by at most n 2^-24 sum |c| + 2^-24 |r|, the bound of a sum in
    any order (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).

    Raises:
        InputError: a reward that is not finite, named by `where`.
    """
    if not len(states):
        return []
    output = model.from_states(states)
    assert output.logits is not None
    rewards = output.logits[:, 0].tolist()
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise InputError(f"{where(i)}: the reward is {reward}")
    if output.latents is not None and output.indices is not None:
        active = zip(output.indices.cpu(), output.latents.float().cpu(), strict=True)
    else:  # without TopK every latent counts
        dense = model.sae.preactivations(states).cpu()
        active = zip(torch.arange(dense.shape[1]).expand_as(dense), dense, strict=True)
    head = model.score.weight[0].detach().cpu()
    steering = own_profile(model)
    program = Nonlinear.of(steering, head) if steering else None
    return [
        _explanation(reward, features, activations, head, program, item, top)
        for reward, (features, activations), item in zip(rewards, active, encoded, strict=True)
    ]


def _explanation(
    reward: float,
    features: Tensor,
    activations: Tensor,
    head: Tensor,
    program: Nonlinear | None,
    encoded: Encoded,
    top: int,
) -> Explanation:
    found = activations != 0  # zeros only fill a row up
    features, activations = features[found], activations[found]
    weights, bias = head[features], 0.0
    if program is not None:  # clamped activations, and weights that a gate changes
        activations, weights, bias = effective(program, activations, features, head)
    values = activations.double() * weights.double()
    order = values.abs().argsort(descending=True, stable=True)
    columns = (features, activations, weights, values)
    rows = zip(*(column[order[:top]].tolist() for column in columns), strict=True)
    return Explanation(
        reward=reward,
        bias=bias,
        contributions=[Contribution(*row) for row in rows],
        rest=values[order[top:]].sum().item(),
        n_rest=max(0, len(order) - top),
        n_tokens=len(encoded.ids),
        dropped=encoded.dropped,
    )
