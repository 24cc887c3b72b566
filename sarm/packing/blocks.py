"""A decoder's layers as the packed engine calls them: on matrices of tokens, attention left out.

The modules of a transformers decoder are called one by one, so weights are shared, and linears that
were quantised or otherwise replaced work. `Int8Decoder` has parts of its own, made for this.

    T  tokens    H  query heads    G  key heads    D  head width
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sarm.attention import windows
from sarm.quantization import Int8Decoder

#: Rotary embeddings whose frequencies depend on the longest sequence of a batch.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
#: Architectures whose layers are laid out as `_FloatBlocks` expects.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


class Blocks(Protocol):
    """What the engine asks of a decoder; `i` counts layers."""

    query_heads: int
    key_heads: int
    head_dim: int
    scale: float
    softcap: Any  # float or None
    windows: list[int | None]  # sliding window of every layer, None where it sees everything
    dtype: torch.dtype  # of q, k and v

    def __len__(self) -> int: ...

    def fine_rows(self, ids: Tensor) -> Tensor | None:
        """Of (T,) ids on the host the ascending rows that deserve more precision, if any.

        The engine runs them a second time by themselves, `fine`, and keeps what that gives.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) -> the residual stream (T, d_model) before the first layer; its own storage."""
        ...

    def rope(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) -> cos and sin (T, D / 2), contiguous."""
        ...

    def keys_and_values(self, i: int, hidden: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
        """(T, G, D) each, before positions."""
        ...

    def queries_keys_values(
        self, i: int, hidden: Tensor, fine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, D) and twice (T, G, D), before positions."""
        ...

    def queries(self, i: int, hidden: Tensor, fine: bool) -> Tensor:
        """(T, H, D), before positions."""
        ...

    def finish(self, i: int, hidden: Tensor, mixed: Tensor, fine: bool) -> None:
        """What follows attention, in place: output projection, MLP and the residual sums."""
        ...

    def restore(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The residual stream of tokens (T,), on the host, after the last layer."""
        ...


def unpackable(backbone) -> str | None:
    """Why this decoder has to take the padded path, or None."""
    if backbone.config.model_type not in KNOWN:
        return f"unknown architecture {backbone.config.model_type!r}"
    if backbone.rotary_emb.rope_type in BATCH_DEPENDENT_ROPE:
        return f"rope type {backbone.rotary_emb.rope_type!r} depends on the length of the batch"
    return None


def blocks_of(backbone) -> Blocks:
    """The blocks of a decoder that is not `unpackable`."""
    return _Int8Blocks(backbone) if isinstance(backbone, Int8Decoder) else _FloatBlocks(backbone)


class _FloatBlocks:
    """Of a transformers decoder."""

    def __init__(self, backbone: Any) -> None:
        self._backbone, self._layers = backbone, backbone.layers
        self.windows = windows(backbone.config)
        self.dtype = backbone.dtype
        block = backbone.layers[0].self_attn
        self.query_heads = block.config.num_attention_heads
        self.key_heads = block.config.num_key_value_heads
        self.head_dim = block.head_dim
        self.scale = block.scaling
        self.softcap = getattr(block, "attn_logit_softcapping", None)

    def __len__(self) -> int:
        return len(self._layers)

    def fine_rows(self, ids: Tensor) -> Tensor | None:
        return None

    def embed(self, ids: Tensor) -> Tensor:
        return self._backbone.embed_tokens(ids[None])[0]

    def rope(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._backbone.rotary_emb(hidden[None], positions[None])
        half = self.head_dim // 2  # the tables repeat their first half
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def keys_and_values(self, i: int, hidden: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
        x = self._layers[i].input_layernorm(hidden)
        return self._heads(i, "k", x), self._heads(i, "v", x)

    def queries_keys_values(
        self, i: int, hidden: Tensor, fine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._layers[i].input_layernorm(hidden)
        return self._heads(i, "q", x), self._heads(i, "k", x), self._heads(i, "v", x)

    def queries(self, i: int, hidden: Tensor, fine: bool) -> Tensor:
        return self._heads(i, "q", self._layers[i].input_layernorm(hidden))

    def _heads(self, i: int, name: str, x: Tensor) -> Tensor:
        return heads(self._layers[i].self_attn, name, x)

    def finish(self, i: int, hidden: Tensor, mixed: Tensor, fine: bool) -> None:
        layer = self._layers[i]
        update = layer.self_attn.o_proj(mixed)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma-2
            hidden += layer.post_attention_layernorm(update)
            update = layer.mlp(layer.pre_feedforward_layernorm(hidden))
            hidden += layer.post_feedforward_layernorm(update)
        else:
            hidden += update
            hidden += layer.mlp(layer.post_attention_layernorm(hidden))

    def restore(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return self._backbone.norm(hidden)


def heads(block: Any, name: str, x: Tensor) -> Tensor:
    """(rows, heads, D): a projection with its per-head norm, if the architecture has one."""
    projected = getattr(block, f"{name}_proj")(x).unflatten(-1, (-1, block.head_dim))
    norm = getattr(block, f"{name}_norm", None)
    return projected if norm is None else norm(projected)


class _Int8Blocks:
    """Of an 8-bit decoder: every step works row by row, so no bit depends on the packing."""

    def __init__(self, decoder: Int8Decoder) -> None:
        self._decoder: Any = decoder  # torch's stubs take a layer's methods for tensors
        self._layers: Any = decoder.layers
        self.windows = windows(decoder.config)
        self.dtype = decoder.attention_dtype
        shape = decoder.shape
        self.query_heads, self.key_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.head_dim
        self.scale, self.softcap = shape.head_dim**-0.5, None

    def __len__(self) -> int:
        return len(self._layers)

    def fine_rows(self, ids: Tensor) -> Tensor | None:
        return self._decoder.fine_rows(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self._decoder.embed(ids)

    def rope(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._decoder.rope(positions)

    def keys_and_values(self, i: int, hidden: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
        return self._layers[i].keys_and_values(hidden, fine)

    def queries_keys_values(
        self, i: int, hidden: Tensor, fine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._layers[i].attention_inputs(hidden, fine)

    def queries(self, i: int, hidden: Tensor, fine: bool) -> Tensor:
        return self._layers[i].queries(hidden, fine)

    def finish(self, i: int, hidden: Tensor, mixed: Tensor, fine: bool) -> None:
        layer = self._layers[i]
        x = layer.attention_output(hidden, mixed)
        if fine:
            hidden.copy_(layer.fine_mlp(x))
        else:
            layer.mlp(x, out=hidden)

    def restore(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return self._decoder.restore(hidden, ids)
