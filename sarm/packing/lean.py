"""A Llama layer for training with its backward pass written out: half the memory, fewer passes.

    T  tokens

What autograd would keep of a layer is 11,136 numbers a token in SmolLM2-135M, this 5,760: inputs of
the norms, q, k, v, gate and up. The outputs of the norms and of the gate are cheap to make again
(they are no products of matrices) and are needed only to find the weights' gradients.

`lean_layers` puts it into layers that are nothing but this (plain linears without biases, no norms
of q and k); LoRA, 8-bit linears and other architectures keep the forward of transformers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from sarm.attention import Spans, attention, windows
from sarm.packing.forward import rotate

CHUNK = 1024  # rows of an MLP computed again: 6 MiB each of gate and up in SmolLM2-135M
Rope = tuple[Tensor, Tensor]
SILU = (nn.SiLU, type(ACT2FN["silu"]))


@contextlib.contextmanager
def lean_layers(layers: Sequence[Any]) -> Iterator[None]:
    """While open, the layers that can be lean are."""
    changed = [layer for layer in layers if is_lean(layer)]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def is_lean(layer: Any) -> bool:
    """Whether `lean_layers` can speed this layer up without changing what it computes."""
    block, mlp = layer.self_attn, getattr(layer, "mlp", None)
    linears = [getattr(block, f"{n}_proj") for n in "qkvo"]
    linears += [getattr(mlp, f"{n}_proj", None) for n in ("gate", "up", "down")]
    return (
        all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
        and mlp is not None
        and isinstance(mlp.act_fn, SILU)
        and hasattr(layer.input_layernorm, "variance_epsilon")
        and not hasattr(block, "q_norm")
        and not hasattr(layer, "pre_feedforward_layernorm")
    )


def takes(hidden: Tensor) -> bool:
    """Whether these inputs are for a lean layer: in 16 bits the norm rounds in between."""
    wide = hidden.dtype in (torch.float32, torch.float64)
    return wide and not torch.is_autocast_enabled(hidden.device.type)


def _forward(layer: Any, hidden: Tensor, *, position_embeddings: Rope, spans: Spans) -> Tensor:
    """In the place of the layer's own forward: hidden (1, T, d_model) -> (1, T, d_model)."""
    if not takes(hidden):
        return type(layer).forward(
            layer, hidden, position_embeddings=position_embeddings, spans=spans
        )
    again = layer.gradient_checkpointing and layer.training
    return lean_layer(layer, hidden[0], rope=position_embeddings, spans=spans, again=again)[None]


@dataclass(frozen=True)
class LeanLayer:
    """A layer's computation but for its weights, which are arguments.

    cos, sin: (T, D / 2).  wanted: rows that get a query, whose attention `spans` is; None: all T.
    eps: of the two norms.
    """

    cos: Tensor
    sin: Tensor
    spans: Spans
    wanted: Tensor | None
    head_dim: int
    scale: float
    window: int | None
    eps: tuple[float, float]

    def attend(
        self, hidden: Tensor, gain: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor
    ) -> Tensor:
        """(T, d_model) -> (n, d_model): norm, attention and residual of the n wanted rows."""
        wide = functools.partial(torch.unflatten, dim=-1, sizes=(-1, self.head_dim))
        cos, sin = self.cos, self.sin
        if self.wanted is None:
            q, k, v = map(wide, _NormLinears.apply(hidden, gain, self.eps[0], w_q, w_k, w_v))
        else:
            k, v = map(wide, _NormLinears.apply(hidden, gain, self.eps[0], w_k, w_v))
            hidden, cos, sin = (t[self.wanted] for t in (hidden, cos, sin))
            (q,) = map(wide, _NormLinears.apply(hidden, gain, self.eps[0], w_q))
        mixed = attention(
            _Rotate.apply(q, cos, sin),
            _Rotate.apply(k, self.cos, self.sin),
            v,
            self.spans,
            scale=self.scale,
            window=self.window,
        )
        return torch.addmm(hidden, mixed.flatten(1), w_o.t())

    def feed(
        self, hidden: Tensor, gain: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
    ) -> Tensor:
        """(n, d_model) -> (n, d_model): norm, MLP and residual."""
        gate, up = _NormLinears.apply(hidden, gain, self.eps[1], w_gate, w_up)
        return _GatedDown.apply(hidden, gate, up, w_down)


def lean_layer(
    layer: Any,
    hidden: Tensor,
    *,
    rope: Rope,
    spans: Spans,
    wanted: Tensor | None = None,
    again: bool = False,
) -> Tensor:
    """(T, d_model) -> (T, d_model); of the wanted rows alone, whose attention `spans` is then.

    rope: cos and sin (1, T, D), or (1, T, D / 2): their second halves repeat the first.
    again: keep the input alone and compute the layer again in the backward pass.
    """
    block, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    half = block.head_dim // 2
    cos, sin = (table[0, :, :half].contiguous() for table in rope)
    lean = LeanLayer(
        cos,
        sin,
        spans,
        wanted,
        block.head_dim,
        block.scaling,
        windows(block.config)[block.layer_idx],
        (norms[0].variance_epsilon, norms[1].variance_epsilon),
    )
    attends = norms[0].weight, *(getattr(block, f"{n}_proj").weight for n in "qkvo")
    feeds = norms[1].weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    if again:
        return _Recomputed.apply(hidden, lean, *attends, *feeds)
    return lean.feed(lean.attend(hidden, *attends), *feeds)


class _NormLinears(torch.autograd.Function):
    # RMSNorm(x) W_i^T for every W_i (rows, d_model); x alone is kept
    # u = x / rms(x),  y = u * g,  out_i = y W_i^T
    # d_W_i = d_out_i^T y      d_y = sum_i d_out_i W_i      d_g = sum over tokens of d_y * u
    # d_x = (d_u - u mean(d_u * u)) / rms(x)   with   d_u = d_y * g
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, *weights: Tensor) -> tuple:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square_().div_(x.shape[-1]) + eps).rsqrt_()
        y = (x * scale).mul_(gain)
        ctx.save_for_backward(x, scale, gain, *weights)
        return tuple(F.linear(y, w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple:
        x, scale, gain, *weights = ctx.saved_tensors
        unit = x * scale
        y = unit * gain
        d_weights = [
            d.t() @ y if needed else None
            for d, needed in zip(d_outs, ctx.needs_input_grad[3:], strict=True)
        ]
        d_y = d_outs[0] @ weights[0]
        for d, w in zip(d_outs[1:], weights[1:], strict=True):
            d_y.addmm_(d, w)
        product = torch.mul(d_y, unit, out=y)
        d_gain = product.sum(0)
        mean = product.mul_(gain).mean(-1, keepdim=True)
        d_x = d_y.mul_(gain).addcmul_(unit, mean, value=-1).mul_(scale)
        return d_x, d_gain, None, *d_weights


class _Recomputed(torch.autograd.Function):
    # A lean layer of which the input alone is kept. Its MLP goes `CHUNK` tokens at a time, so that
    # its intermediates, two thirds of what a layer needs, are never there for all tokens at once.
    # Attention needs all keys: that half goes in one.
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lean: LeanLayer, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, *weights)
        ctx.lean = lean
        out = lean.attend(hidden, *weights[:5])
        for part in out.split(CHUNK):
            part.copy_(lean.feed(part, *weights[5:]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        hidden, *weights = ctx.saved_tensors
        inputs = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(
                (hidden, *weights), ctx.needs_input_grad[:1] + ctx.needs_input_grad[2:], strict=True
            )
        ]
        with torch.enable_grad():
            attended = ctx.lean.attend(*inputs[:6])
        d_attended, *of_feed = _in_chunks(ctx.lean.feed, attended.detach(), d_out, inputs[6:])
        found = [*_gradients(attended, inputs[:6], d_attended), *of_feed]
        return found[0], None, *found[1:]


def _in_chunks(
    feed: Callable[..., Tensor], hidden: Tensor, d_out: Tensor, weights: Sequence[Tensor]
) -> list[Any]:
    """Gradients of feed(hidden, *weights), which works row by row: of hidden and of the weights.

    That of hidden takes its place in memory.
    """
    sums = [torch.zeros_like(w) if w.requires_grad else None for w in weights]
    for rows, d_rows in zip(hidden.split(CHUNK), d_out.split(CHUNK), strict=True):
        part = rows.clone().requires_grad_()
        with torch.enable_grad():
            out = feed(part, *weights)
        d_part, *found = _gradients(out, [part, *weights], d_rows)
        rows.copy_(d_part)
        for total, d in zip(sums, found, strict=True):
            if total is not None:
                total.add_(d)
    return [hidden, *sums]


def _gradients(out: Tensor, inputs: Sequence[Tensor], d_out: Tensor) -> list[Any]:
    """A tensor for every input that needs a gradient, None for the others."""
    learn = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(out, learn, d_out) if learn else ())
    return [next(found) if t.requires_grad else None for t in inputs]


class _GatedDown(torch.autograd.Function):
    # out = residual + a W^T,  a = silu(gate) * up;  a is made again for d_W = d_out^T a
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return torch.addmm(residual, F.silu(gate).mul_(up), weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        d_weight = d_out.t() @ (silu * up) if ctx.needs_input_grad[3] else None
        d_a = d_out @ weight
        d_up = silu.mul_(d_a)
        d_gate = torch.ops.aten.silu_backward(d_a.mul_(up), gate)
        return d_out, d_gate, d_up, d_weight


class _Rotate(torch.autograd.Function):
    # a rotation: its gradient is the one by the opposite angle
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotate(x, (cos, sin), slice(None), out=(out := torch.empty_like(x)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        rotate(d_out, (cos, -sin), slice(None), out=(d_x := torch.empty_like(d_out)))
        return d_x, None, None


def embedded(table: nn.Embedding, ids: Tensor) -> Tensor:
    """(T,) -> (T, d_model), whose gradient goes straight into the rows of `table.weight.grad`.

    Autograd would make a gradient of the whole table for every pass and add it up: SmolLM2's is
    113 MB, of which a pass of 1,000 tokens has 2 %. Where other machines wait for the gradient's
    hook, it is done that way.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if alone and type(table) is nn.Embedding and table.weight.requires_grad:
        return _Embed.apply(table.weight, ids, table.padding_idx)
    return table(ids)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, -1 if padding is None else padding
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        (ids,), sums = ctx.saved_tensors, ctx.weight.grad
        if sums is None:
            return (
                torch.ops.aten.embedding_dense_backward(
                    d_out, ids, len(ctx.weight), ctx.padding, False
                ),
                None,
                None,
            )
        sums.index_add_(0, ids, d_out.masked_fill((ids == ctx.padding)[:, None], 0).to(sums))
        return None, None, None
