"""The half backbone in 8 bits: W8A8 layers in a rotated basis, everything around attention by rows.

The residual stream is fp32 and rotated (`sarm.quantization.rotation`); layers are those of
`sarm.quantization.layer`. The tokens that are scored get more care, because their states are what
the model is for: their activations have 16 bits (`sarm.quantization.fine`), and the constant part
of what rounding does to them is measured once and taken off (`sarm.calibration`).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sarm.attention import windows
from sarm.quantization.layer import Int8DecoderLayer, LayerShape, check_supported
from sarm.quantization.rotation import Rotation

#: Positions whose rotary tables are computed together.
ROPE_BLOCK = 1024


class Int8Decoder(nn.Module):
    """A quantised half backbone with the calling convention of the decoder it came from.

    `forward` takes right-padded ids (B, T) and returns states in the original basis, fp32. An
    engine of its own batching uses the parts: `embed`, `layers[i].attention_inputs`,
    `.attention_output`, `.mlp`, `rope`, `fine_rows` and `restore`.

    Buffers beside the layers: `embedding` (vocab, d); `scored_ids` (n,) int64, the tokens whose
    activations get 16 bits, none until `set_scored`, and `offsets` (n, d) fp32, what is added to
    their states at the end.

    Args:
        config: the cut decoder's configuration.   rotary_emb: its rotary embedding.
        embedding: (vocab, d) in any float dtype.
        rotate: False: naive W8A8, for comparison.
        dtype: of q, k, v, attention and the embedding.
    """

    embedding: Tensor
    scored_ids: Tensor
    offsets: Tensor

    def __init__(
        self,
        config: PreTrainedConfig,
        rotary_emb: nn.Module,
        embedding: Tensor,
        *,
        rotate: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.rotary_emb = config, rotary_emb
        self.shape = LayerShape.of(config)
        self.attention_dtype = dtype
        device = embedding.device
        self.rotation = Rotation(config.hidden_size).to(device) if rotate else None
        self.head_rotation = Rotation(self.shape.head_dim, seed=None).to(device) if rotate else None
        self.layers = nn.ModuleList()
        rows = torch.empty(embedding.shape, dtype=dtype, device=embedding.device)
        for part in torch.arange(len(rows)).split(4096):
            wide = embedding[part].detach().float()
            rows[part] = (self.rotation(wide) if self.rotation is not None else wide).to(dtype)
        self.register_buffer("embedding", rows)
        self.set_scored([])
        self._tables = (torch.empty(0), torch.empty(0))  # cos and sin, see `rope`

    def add_layer(self, tensors: Mapping[str, Tensor]) -> None:
        """Quantise the next layer's tensors; they may be dropped afterwards."""
        self.layers.append(
            Int8DecoderLayer(
                tensors, self.shape, self.rotation, self.head_rotation, self.attention_dtype
            )
        )
        _return_free_memory()

    def set_scored(self, ids: Sequence[int], offsets: Tensor | None = None) -> None:
        """Name the tokens that are scored, and what is added to each one's states: (n, d), or 0."""
        device = self.embedding.device
        if offsets is None:
            offsets = torch.zeros(len(ids), self.config.hidden_size)
        scored = torch.tensor(ids, dtype=torch.int64, device=device)
        self.register_buffer("scored_ids", scored)
        self.register_buffer("offsets", offsets.to(device, torch.float32))
        self._scored = list(ids)  # on the host, where rows are picked

    def fine_rows(self, ids: Tensor) -> Tensor | None:
        """Which of the tokens (T,) on the host are scored ones: ascending rows, or None."""
        if not self._scored:
            return None
        rows = torch.isin(ids, torch.tensor(self._scored)).nonzero()[:, 0]
        return rows if len(rows) else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return torch.float32

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (T,) -> the residual stream (T, d) fp32 before the first layer, rotated."""
        return self.embedding[ids].float()

    def restore(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """The residual stream of the tokens `ids` (T,), on the host, in the original basis.

        Bitwise the same in any batch. Without ids no offset is added.
        """
        states = x if self.rotation is None else self.rotation.inverse(x)
        if ids is not None and self._scored:
            states = states.clone() if states is x else states
            for token, offset in zip(self._scored, self.offsets, strict=True):
                rows = (ids == token).nonzero()[:, 0].to(states.device)
                states[rows] += offset
        return states

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin (T, head_dim / 2) fp32 of positions (T,).

        Read from tables that are computed in blocks of one size, so that a position's bits do not
        depend on the others: a vectorised cosine may differ in its last bit from a scalar one.
        """
        longest = int(positions.max()) + 1 if len(positions) else 0
        cos, sin = tables = self._tables  # replaced whole: threads may share a decoder
        if len(cos) < longest or cos.device != self.device:
            tables = self._tables = self._rope_tables(-(-longest // ROPE_BLOCK))
        cos, sin = tables
        return cos[positions], sin[positions]

    def _rope_tables(self, blocks: int) -> tuple[Tensor, Tensor]:
        half = self.shape.head_dim // 2  # the model's tables repeat their first half
        x = self.embedding[:1].float()
        parts = []
        for first in range(0, blocks * ROPE_BLOCK, ROPE_BLOCK):
            positions = torch.arange(first, first + ROPE_BLOCK, device=self.device)
            cos, sin = self.rotary_emb(x[None], position_ids=positions[None])
            parts.append((cos[0, :, :half], sin[0, :, :half]))
        cos, sin = zip(*parts, strict=True)
        return torch.cat(cos), torch.cat(sin)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> BaseModelOutputWithPast:
        """States (B, T, d) fp32 after the last layer; padding must be on the right."""
        b, t = input_ids.shape
        ids = input_ids.reshape(-1)
        x = self.embed(ids)
        ids = ids.cpu()
        fine = self.fine_rows(ids)
        fine = None if fine is None else fine.to(x.device)
        positions = torch.arange(t, device=input_ids.device)[None]
        cos, sin = self.rotary_emb(x.view(b, t, -1), position_ids=positions)
        visible = windows(self.config)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Int8DecoderLayer)
            inputs = layer.attention_inputs(x)
            if fine is not None:
                for part, some in zip(inputs, layer.attention_inputs(x[fine], True), strict=True):
                    part[fine] = some
            q, k, v = (part.view(b, t, -1, self.shape.head_dim).transpose(1, 2) for part in inputs)
            q, k = apply_rotary_pos_emb(q.float(), k.float(), cos, sin)
            attended = self._attend(q.to(v.dtype), k.to(v.dtype), v, visible[index])
            x = layer.attention_output(x, attended.transpose(1, 2).reshape(b * t, -1))
            precise = None if fine is None else layer.fine_mlp(x[fine])
            x = layer.mlp(x)
            if precise is not None:
                x[fine] = precise
        return BaseModelOutputWithPast(last_hidden_state=self.restore(x, ids).view(b, t, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        groups, t = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if window is None or t <= window:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        ahead = torch.arange(t, device=q.device)
        back = ahead[:, None] - ahead[None, :]
        mask = (back >= 0) & (back < window)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _return_free_memory() -> None:
    """Give the system what glibc keeps of freed blocks: 110 MiB after a layer of Llama-3-8B."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def quantize_backbone(
    backbone: PreTrainedModel,
    *,
    rotate: bool = True,
    dtype: torch.dtype | None = None,
    consume: bool = False,
) -> Int8Decoder:
    """The 8-bit form of a `sarm.load_backbone` decoder, built layer by layer.

    Args:
        backbone: Llama, Mistral, Qwen2 or Qwen3.
        rotate: False: naive W8A8, for comparison.
        dtype: of q, k, v, attention and the embedding; None: the backbone's.
        consume: empty the backbone on the way, so that memory never holds both (peak: one layer).
    Raises:
        InputError: an architecture whose layers cannot be rotated.
    """
    check_supported(backbone.config)
    source: Any = backbone  # torch's stubs take every attribute for a tensor or a module
    decoder = Int8Decoder(
        copy.deepcopy(backbone.config),
        copy.deepcopy(source.rotary_emb),
        source.embed_tokens.weight,
        rotate=rotate,
        dtype=dtype or backbone.dtype,
    )
    if consume:
        source.embed_tokens.to("meta")
    for layer in source.layers:
        decoder.add_layer(layer.state_dict())
        if consume:
            layer.to("meta")
    return decoder.eval()
