"""The packed forward pass with gradients: what a backbone is trained with.

The decoder's own layers run on one row of T packed tokens, so that gradient checkpointing, LoRA
and replaced linears work as always; attention between packed tokens is registered with transformers
as `sarm_packed`. The last layer gives every token a key and a value, but queries, output
projection and MLP run for the wanted tokens only. A shared prefix runs once and its gradient is
the sum over the sequences that share it.

    T  packed tokens    n  wanted tokens    H  query heads    G  key heads    D  head width
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sarm.attention import Spans, attention, windows
from sarm.errors import InputError
from sarm.packing.batch import PackedBatch
from sarm.packing.blocks import heads, unpackable
from sarm.packing.lean import embedded, is_lean, lean_layer, lean_layers, takes
from sarm.quantization import Int8Decoder

NAME = "sarm_packed"

Rope = tuple[Tensor, Tensor]


@contextlib.contextmanager
def packed_attention(backbone) -> Iterator[None]:
    """While open, the backbone's layers attend by the spans they are given.

    Open it around forward *and* backward: gradient checkpointing runs layers again.

    Raises:
        InputError: an architecture that cannot be packed.
    """
    problem = unpackable(backbone)
    if isinstance(backbone, Int8Decoder):
        problem = "an 8-bit decoder has no gradients"
    if problem:
        raise InputError(f"training needs packed sequences: {problem}")
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = NAME
    try:
        with lean_layers(backbone.layers):
            yield
    finally:
        backbone.config._attn_implementation = before


def wanted_states(backbone, batch: PackedBatch, kept_tokens: int | None = None) -> Tensor:
    """(n, d_model) residual stream after the last layer, at the wanted tokens, with gradients.

    Args:
        kept_tokens: with gradient checkpointing, how many tokens' activations are kept all the
            same: a pack of fewer is not computed again, of a larger one as few layers as possible.
            None: all layers are computed again.
    """
    hidden = embedded(backbone.embed_tokens, batch.ids)[None]
    rope = backbone.rotary_emb(hidden, batch.positions[None])
    if takes(hidden) and all(map(is_lean, backbone.layers)):  # all layers share these copies
        rope = tuple(table[..., : table.shape[-1] // 2].contiguous() for table in rope)
    *layers, last = backbone.layers
    kept = 0
    if kept_tokens is not None:
        # the last ones are kept: their activations are gone when the first are computed again
        kept = layers_kept(len(layers), len(batch.ids), kept_tokens)
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < len(layers) - kept
    for layer in layers:
        hidden = layer(hidden, position_embeddings=rope, spans=batch.spans)
    if is_lean(last) and takes(hidden):
        found = lean_layer(
            last,
            hidden[0],
            rope=rope,
            spans=batch.wanted_spans,
            wanted=batch.wanted,
            again=last.gradient_checkpointing and last.training and not kept,
        )
    else:
        window = windows(backbone.config)[-1]
        found = _last_layer(last, hidden[0], (rope[0][0], rope[1][0]), batch, window)
    return backbone.norm(found)


def layers_kept(layers: int, tokens: int, kept_tokens: int) -> int:
    """How many layers' activations fit where those of `kept_tokens` tokens do.

    A layer that is computed again keeps its input, a tenth of what a lean layer keeps.
    """
    if tokens <= kept_tokens:
        return layers
    return max(0, layers * (10 * kept_tokens - tokens) // (9 * tokens))


def _last_layer(
    layer: Any, hidden: Tensor, rope: Rope, batch: PackedBatch, window: int | None
) -> Tensor:
    """(n, d_model): the layer's output for the wanted tokens of hidden (T, d_model)."""
    block, wanted = layer.self_attn, batch.wanted
    x = layer.input_layernorm(hidden)
    mixed = attention(
        rotated(heads(block, "q", x[wanted]), (rope[0][wanted], rope[1][wanted])),
        rotated(heads(block, "k", x), rope),
        heads(block, "v", x),
        batch.wanted_spans,
        scale=block.scaling,
        window=window,
        softcap=getattr(block, "attn_logit_softcapping", None),
    )
    hidden = hidden[wanted]
    update = block.o_proj(mixed.flatten(1))
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma-2
        hidden = hidden + layer.post_attention_layernorm(update)
        update = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        return hidden + layer.post_feedforward_layernorm(update)
    hidden = hidden + update
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of x (rows, heads, D) by tables (rows, D)."""
    cos, sin = (table[:, None] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    spans: Spans,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (1, H, T, D), k and v (1, G, T, D) -> (1, T, H, D)."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    mixed = attention(q, k, v, spans, scale=scaling, window=sliding_window, softcap=softcap)
    return mixed[None], None


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)  # spans say it all
