"""A reward along a response: what it was after every token, and which features made it so.

Two readings of "the reward at token t" of a response:

- "ended": the reward of the conversation if its last turn had ended after token t. The tokens up to
  t are followed by the token that ends the turn, whose state is read, as a scorer does. This is
  what the model was made for. All prefixes share their tokens: a response of T tokens costs T more.
- "read": the SARM applied to the state of token t itself, where it was not trained to be read. It
  shows where in the text a feature is active; the reward's scale means little before the last
  token.

In both the last entry is the reward of the response.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from sarm.errors import InputError
from sarm.explanation import Explanation, explain_states
from sarm.features.text import TokenTexts
from sarm.interpret.attribution import named
from sarm.packing import TOKENS_PER_BATCH, iter_tail_states
from sarm.scorer import SARMScorer
from sarm.tokens import Conversation, ConversationEncoder, Encoded

READINGS = ("ended", "read")


@dataclass(frozen=True)
class FeatureTrace:
    """One feature's activation at every token; times `weight` its part of the reward there."""

    feature: int
    weight: float
    activations: list[float]
    label: str | None = None


@dataclass(frozen=True)
class Trace:
    """A reward along a response.

    tokens: the response's, as text ("read": the token that ends the turn too).  rewards: one a
    token.  features: those with the largest parts of the final reward.  reading: see the module.
    explanation: of the whole response.
    """

    reading: str
    tokens: list[str]
    rewards: list[float]
    features: list[FeatureTrace]
    explanation: Explanation


@torch.inference_mode()
def trace(
    scorer: SARMScorer,
    conversation: Conversation,
    top: int = 10,
    reading: Literal["ended", "read"] = "ended",
    names: Mapping[int, str] | None = None,
) -> Trace:
    """The reward and its `top` features at every token of the last turn.

    Raises:
        InputError: no tokenizer, an unknown reading, a malformed conversation, or a SARM without
        sparse features.
    """
    if reading not in READINGS:
        raise InputError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
    if top < 0:
        raise InputError(f"trace: top must be >= 0, got {top}")
    model = scorer.model
    if model.config.sarm["activation"] == "none":
        raise InputError("trace: a SARM with activation 'none' has no sparse features")
    (encoded,) = scorer.encode([conversation])
    ids, first = encoded.ids, response_start(scorer, conversation, encoded)
    if reading == "ended":
        rows = [[*ids[: t + 1], ids[-1]] for t in range(first, len(ids) - 1)] or [ids]
        states = torch.empty(len(rows), model.sae.d_model)
        for indices, some in scorer.without_prefix_cache()._states(rows):
            states[indices] = some
        shown = ids[first:-1] or ids[-1:]
    else:
        limit = scorer.max_batch_tokens or TOKENS_PER_BATCH.get(model.device.type, 8192)
        shown = ids[first:]
        ((_, (states,)),) = iter_tail_states(model.model, [ids], len(shown), max(limit, len(ids)))
    states = states.to(model.device)
    every = [Encoded(ids, encoded.dropped)] * len(states)
    explanations = [
        explanation
        for start in range(0, len(states), 1024)
        for explanation in explain_states(
            model, states[start : start + 1024], every[start : start + 1024], model.sae.n_latents
        )
    ]
    last = explanations[-1]
    at_token = [{c.feature: c.activation for c in e.contributions} for e in explanations]
    names = names or {}
    return Trace(
        reading=reading,
        tokens=TokenTexts(scorer.tokenizer)(shown),
        rewards=[e.reward for e in explanations],
        features=[
            FeatureTrace(
                c.feature,
                c.weight,
                [active.get(c.feature, 0.0) for active in at_token],
                names.get(c.feature),
            )
            for c in last.contributions[:top]
        ],
        explanation=named(last, names),
    )


def response_start(scorer: SARMScorer, conversation: Conversation, encoded: Encoded) -> int:
    """Where the last turn's content begins in the token ids of a conversation.

    Found by comparison with the same conversation with other answers: what all of them begin with
    is the prompt and the turn's opening.
    """
    whole = ConversationEncoder(scorer.tokenizer, 1 << 30)
    turns = list(conversation)
    others = [[*turns[:-1], {**turns[-1], "content": text}] for text in ("\u2237", "a")]
    own, *rest = (item.ids for item in whole.encode([turns, *others]))
    start = min(
        next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(other))
        for other in rest
    )
    kept = 1 if encoded.dropped and encoded.ids[0] == scorer.tokenizer.bos_token_id else 0
    return min(max(start - encoded.dropped, kept), len(encoded.ids) - 1)
