"""One decoder layer in 8 bits: W8A8 linears on plain token matrices, row by row.

Weights are int8 with a scale per output channel, activations are quantised per token on the way
(`sarm.ops.int8_linear`). No step looks at a second row, and the sums are integers: a token's q, k,
v and MLP have the same bits in any batch and for any number of threads.

    T tokens (rows)    d = d_model    F = MLP width    heads, kv_heads of head_dim
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sarm import ops
from sarm.errors import InputError
from sarm.quantization.fine import fine_linear, silu_by_rows
from sarm.quantization.rotation import (
    READERS,
    WRITERS,
    Rotation,
    hadamard,
    rotate_bias,
    rotate_reader,
    rotate_writer,
)

#: Decoders with Llama's layer: two RMSNorms, attention, a SiLU-gated MLP.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
#: Parts of the online Hadamard transform before down_proj (fewer where they do not divide F).
ONLINE_PARTS = 64
# Rows whose gate and up (fp32) take 8 MiB: they stay in cache, and the allocator reuses them
# instead of fetching fresh pages (4,000 rows of 3,072 at once: 24 ms for 11 ms of products).
_GATE_UP_ELEMENTS = 2 << 20
# But so many rows at least: every part packs the weights anew, which costs as much as 8 rows. 256
# of Llama-3-8B are 28 MiB; malloc keeps blocks up to 32 MiB for reuse.
_MLP_ROWS = 256
# Heads whose rows are rotated and quantised together: of Llama-3-8B 1,024 rows, 16 MiB.
_HEADS = 8


@dataclass(frozen=True)
class LayerShape:
    """What a layer's tensors do not say."""

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    parts: int  # of the online Hadamard transform

    @classmethod
    def of(cls, config: PreTrainedConfig, parts: int = ONLINE_PARTS) -> LayerShape:
        """The shape of a supported configuration, or InputError."""
        check_supported(config)
        heads = config.num_attention_heads
        return cls(
            d_model=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=config.rms_norm_eps,
            parts=min(parts, config.intermediate_size & -config.intermediate_size),
        )


def check_supported(config: PreTrainedConfig) -> None:
    """InputError for a decoder whose layers cannot be rotated."""
    if config.model_type not in SUPPORTED:
        why = ""
        if config.model_type == "gemma2":
            why = " (its norms after attention and MLP do not commute with a rotation)"
        raise InputError(
            f'quantization "int8": {config.model_type} is not supported{why}; '
            f"supported: {', '.join(SUPPORTED)}"
        )
    if config.hidden_act != "silu":
        raise InputError(
            f'quantization "int8": the MLP activation must be silu, got {config.hidden_act!r}'
        )


class Int8Linear(nn.Module):
    """Buffers of one int8_linear: `weight` (out, in) int8, `scale` (out,) and maybe `bias` fp32."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(
        self,
        rows: ops.QuantizedRows,
        residual: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        columns: slice = slice(None),
    ) -> Tensor:
        """(N, out): rows @ weight.T + bias + residual, or some of its columns."""
        bias = None if self.bias is None else self.bias[columns]
        weight, scale = self.weight[columns], self.scale[columns]
        return ops.int8_linear(*rows, weight, scale, bias, residual, out_dtype=out_dtype)

    def fine(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """(N, out) fp32 of x (N, in) fp32, its activations in 16 bits."""
        weight, scale = self.weight[columns], self.scale[columns]
        out = fine_linear(lambda rows: ops.int8_linear(*rows, weight, scale), x)
        return out if self.bias is None else out + self.bias[columns]


class Int8DecoderLayer(nn.Module):
    """One layer on plain token matrices (T, d); attention itself is the caller's.

    `fine`, where a method takes it: the activations get 16 bits, for a few rows; of those before
    o_proj 8 are enough.

    Buffers: `qkv` (q's rows, then k's, then v's), `o`, `gate_up` (gate's rows, then up's), `down`,
    each an Int8Linear; `q_norm`, `k_norm` (head_dim,) fp32 for Qwen3; `input_norm`, `mlp_norm`
    (d,) fp32 unless folded into the weights.

    Args:
        tensors: the layer's tensors by their names within the layer, any float dtype. Each is
            taken when its turn comes, so a mapping that reads from a file holds one at a time.
        shape: see LayerShape.
        stream, head: the rotations; None leaves the basis as it is (naive W8A8, for comparison).
        dtype: of q, k and v.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None
    input_norm: Tensor | None
    mlp_norm: Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: LayerShape,
        stream: Rotation | None,
        head: Rotation | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.parts = 1
        if stream is not None and head is not None:
            self.parts = shape.parts
        unused = set(tensors)

        def take(name: str) -> Tensor:
            unused.discard(name)
            return tensors[name].detach()

        def pieces(name: str, weight: Tensor) -> Iterator[Tensor]:
            """Rows in fp32, rotated: a layer is never there in fp32 as a whole."""
            if stream is None or head is None:
                yield weight.float()
            elif name in WRITERS:
                yield rotate_writer(name, weight, stream, head, self.parts)
            else:
                gain = take(f"{READERS[name]}.weight")
                for rows in weight.split(_HEADS * shape.head_dim):
                    yield rotate_reader(name, rows, gain, stream, head)

        def bias_of(name: str) -> Tensor:
            bias = take(f"{name}.bias")
            if stream is None or head is None:
                return bias.float()
            return rotate_bias(name, bias, stream, head)

        def quantized(name: str) -> ops.QuantizedRows:
            """Into buffers that are there before the pieces: blocks that stay, between large ones
            that go, would keep malloc from returning these (250 MiB a layer of Llama-3-8B).
            """
            weight = take(f"{name}.weight")
            q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
            scale = torch.empty(len(q), device=q.device)
            first = 0
            for piece in pieces(name, weight):
                rows = slice(first, first + len(piece))
                q[rows], scale[rows] = ops.quantize_rows(piece)
                first = rows.stop
            return ops.QuantizedRows(q, scale)

        def packed(*names: str) -> Int8Linear:
            biases = [bias_of(name) for name in names if f"{name}.bias" in tensors]
            q, scale = zip(*map(quantized, names), strict=True)
            return Int8Linear(torch.cat(q), torch.cat(scale), torch.cat(biases) if biases else None)

        self.qkv = packed("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = packed("self_attn.o_proj")
        self.gate_up = packed("mlp.gate_proj", "mlp.up_proj")
        self.down = packed("mlp.down_proj")
        for name, norm in (
            ("input_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            gain = take(f"{norm}.weight").float()
            self.register_buffer(name, None if stream is not None else gain)
        for name in ("q_norm", "k_norm"):
            key = f"self_attn.{name}.weight"
            self.register_buffer(name, take(key).float() if key in tensors else None)
        if unused:
            unknown = ", ".join(sorted(unused))
            raise InputError(f'quantization "int8": unknown tensors in a layer: {unknown}')

    def attention_inputs(self, x: Tensor, fine: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream (T, d) -> q (T, heads, head_dim), k, v (T, kv_heads, head_dim).

        Normalised where the model does that per head, not yet rotated by position.
        """
        s = self.shape
        qkv = self._project(x, slice(None), fine)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        return self._normed(q, self.q_norm), self._normed(k, self.k_norm), v.to(self.dtype)

    def queries(self, x: Tensor, fine: bool = False) -> Tensor:
        """The q of `attention_inputs` alone; the same bits."""
        return self._normed(self._project(x, slice(0, self._q_rows), fine), self.q_norm)

    def keys_and_values(self, x: Tensor, fine: bool = False) -> tuple[Tensor, Tensor]:
        """The k and v of `attention_inputs` alone; the same bits."""
        k, v = self._project(x, slice(self._q_rows, None), fine).chunk(2, dim=1)
        return self._normed(k, self.k_norm), v.to(self.dtype)

    @property
    def _q_rows(self) -> int:
        return self.shape.heads * self.shape.head_dim

    def _project(self, x: Tensor, columns: slice, fine: bool) -> Tensor:
        """(T, some of q's, k's and v's heads, head_dim)."""
        if fine:
            out = self.qkv.fine(rms_norm(x, self.input_norm, self.shape.eps), columns)
        else:
            rows = ops.rmsnorm_quantize(x, self.input_norm, self.shape.eps)
            dtype = self.dtype if self.q_norm is None else torch.float32
            out = self.qkv(rows, None, dtype, columns)
        return out.view(len(x), -1, self.shape.head_dim)

    def _normed(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            heads = rms_norm(heads, weight, self.shape.eps)
        return heads.to(self.dtype)

    def attention_output(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x (T, d) plus o_proj of attended (T, heads * head_dim)."""
        return self.o(ops.quantize_rows(attended), residual=x)

    def fine_mlp(self, x: Tensor) -> Tensor:
        """As `mlp`, with activations of 16 bits."""
        gate, up = self.gate_up.fine(rms_norm(x, self.mlp_norm, self.shape.eps)).chunk(2, dim=1)
        return self.down.fine(hadamard(silu_by_rows(gate) * up, self.parts)) + x

    def mlp(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual stream x (T, d) plus the MLP of it, in `out` (T, d) if that is given."""
        step = max(1, len(x))
        if x.device.type == "cpu":
            step = max(_MLP_ROWS, _GATE_UP_ELEMENTS // self.gate_up.weight.shape[0])
        if len(x) <= step and out is None:
            return self._mlp(x)
        out = torch.empty_like(x) if out is None else out
        for rows, part in zip(out.split(step), x.split(step), strict=True):
            rows.copy_(self._mlp(part))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        # on a GPU the gate's bandwidth counts, in a CPU's cache its conversion would
        dtype = torch.float32 if x.device.type == "cpu" else self.dtype
        gate_up = self.gate_up(ops.rmsnorm_quantize(x, self.mlp_norm, self.shape.eps), None, dtype)
        return self.down(ops.silu_mul_quantize(gate_up, self.parts), residual=x)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, fp32, row by row."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight
