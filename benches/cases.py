"""The benchmark cases of the ops: what is timed, on which data, against what.

A case is a function from a Problem to named calls. The first call is the floor: the encoder GEMM
alone where the case has one, else a copy that moves the bytes the op must move. "published dense"
is the published formula in eager PyTorch; the others are the strongest ways to compute the same
that PyTorch and eai-sparsify offer, and the ops of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import baselines
import roofline
import torch
from suite import DTYPES, Candidates, Missing, Shape
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from sarm import ops

GEMM = "GEMM alone"
WIDE_GEMM = "GEMM alone, fp32 upcast"
COPY = "copy of its bytes"
FLOORS = (GEMM, WIDE_GEMM, COPY)
PUBLISHED = "published dense"
COMPILED = "published dense, compiled"
SPARSIFY = "sparsify"
REFERENCE = "sarm reference"
SARM = "sarm"


class Problem:
    """Random data of one shape and dtype; what a candidate does not use is never built."""

    def __init__(self, shape: Shape, dtype: str, device: str) -> None:
        self.shape, self.device, self.dtype = shape, device, DTYPES[dtype]
        self._generator = torch.Generator().manual_seed(0)
        n, d, n_latents, self.k = shape
        self.x = self._normal(n, d).to(self.dtype)
        self.w_enc = self._windows(n_latents, d).to(self.device, self.dtype)
        self.b_enc = self._normal(n_latents, scale=0.1)  # fp32, as the ops want it
        self.b_enc_cast = self.b_enc.to(self.dtype)

    def _normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=self._generator).mul_(scale).to(self.device)

    def _windows(self, n_latents: int, d: int) -> Tensor:
        """Rows of variance 1 / d, cut at distinct places from one stream of normal numbers.

        As good as independent ones here: the correlation of two pre-activations is ~ d^-0.5. 268
        million numbers of their own would take 3 s, in each of a hundred processes.
        """
        places = 16 * n_latents
        stream = torch.randn(places + d - 1, generator=self._generator).mul_(d**-0.5)
        first = torch.randperm(places, generator=self._generator)[:n_latents]
        return stream.unfold(0, d, 1)[first]

    @cached_property
    def head(self) -> Tensor:
        """(1, n_latents) fp32."""
        return self._normal(1, self.shape.n_latents)

    @cached_property
    def latents(self) -> ops.SparseLatents:
        """What the encoder makes of x: real indices, as skewed as they are."""
        return ops.topk_encode(self.x, self.w_enc, self.b_enc, self.k)

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor]:
        """x and w_enc in fp32."""
        return self.x.float(), self.w_enc.float()

    def parameters(self, bias_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(w_enc, b_enc, w_dec, pre_bias) as leaves; the decoder starts tied to the encoder."""
        d = self.shape.d_model
        pre_bias = torch.zeros(d, dtype=bias_dtype, device=self.device)
        leaves = (self.w_enc, self.b_enc.to(bias_dtype), self.w_dec, pre_bias)
        return tuple(leaf.detach().requires_grad_() for leaf in leaves)

    @cached_property
    def w_dec(self) -> Tensor:
        return self.w_enc.clone()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for these shapes."""
    return torch.compile(function, dynamic=False)


def gemm_floors(p: Problem) -> Candidates:
    """F.linear in the weights' dtype; for 16 bits on a CPU also in fp32, often the faster one."""
    floors: Candidates = {GEMM: lambda: linear(p.x, p.w_enc, p.b_enc_cast)}
    if p.dtype != torch.float32 and p.device == "cpu":
        floors[WIDE_GEMM] = lambda: linear(*p.wide, p.b_enc)
    return floors


def copy_floor(p: Problem, case: str) -> Candidates:
    """Reads half of the op's bytes and writes the other half."""
    (work,) = roofline.works(case, p.shape, p.dtype.itemsize)
    source = torch.zeros(max(1, int(work.bytes / 2)), dtype=torch.uint8, device=p.device)
    target = torch.ones_like(source)
    return {COPY: lambda: target.copy_(source)}


def with_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same by the reference backend."""

    def run() -> Any:
        with ops.use_backend("reference"):
            return call()

    return run


def topk_encode(p: Problem) -> Candidates:
    """The encoder."""
    published = (p.x, p.w_enc, p.b_enc_cast, p.k)
    fast = compiled(baselines.published_encode)
    sparsify = baselines.sparsify(p.device)

    def sarm() -> Any:
        return ops.topk_encode(p.x, p.w_enc, p.b_enc, p.k)

    return {
        **gemm_floors(p),
        PUBLISHED: lambda: baselines.published_encode(*published),
        COMPILED: lambda: fast(*published),
        SPARSIFY: sparsify
        if isinstance(sparsify, Missing)
        else lambda: baselines.sparsify_encode(sparsify, *published),
        REFERENCE: with_reference(sarm),
        SARM: sarm,
    }


def sae_step(p: Problem) -> Candidates:
    """Forward and backward of an SAE: gradients of w_enc, b_enc, w_dec, pre_bias."""
    fast = compiled(baselines.published_loss)
    sparsify = baselines.sparsify(p.device)

    def sarm_loss(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor, k: int):
        vals, idx = ops.topk_encode((x - b).to(w_enc.dtype), w_enc, b_enc, k)
        return baselines.normalized_mse(ops.gather_sum(vals, idx, w_dec).float() + b, x)

    def step(loss: Callable[..., Tensor], bias_dtype: torch.dtype) -> Callable[[], Any]:
        parameters = p.parameters(bias_dtype)

        def run() -> tuple[Tensor, ...]:
            value = loss(p.x, *parameters, p.k)
            return (value, *torch.autograd.grad(value, parameters))

        return run

    def sparsify_loss(*arguments: Any) -> Tensor:
        return baselines.sparsify_loss(sparsify, *arguments)

    return {
        **gemm_floors(p),
        PUBLISHED: step(baselines.published_loss, p.dtype),
        COMPILED: step(fast, p.dtype),
        SPARSIFY: sparsify if isinstance(sparsify, Missing) else step(sparsify_loss, p.dtype),
        SARM: step(sarm_loss, torch.float32),
    }


def encode_value(p: Problem) -> Candidates:
    """States to rewards."""
    head = p.head.to(p.dtype)

    def sarm() -> Tensor:
        vals, idx = ops.topk_encode(p.x, p.w_enc, p.b_enc, p.k)
        return ops.sparse_value(vals, idx, p.head)

    return {
        **gemm_floors(p),
        PUBLISHED: lambda: baselines.published_value(p.x, p.w_enc, p.b_enc_cast, head, p.k),
        SARM: sarm,
    }


def sparse_value(p: Problem) -> Candidates:
    """The value head."""
    vals, idx = p.latents
    column = p.head.t().contiguous()
    return {
        **copy_floor(p, "sparse_value"),
        PUBLISHED: lambda: baselines.scatter_dense(vals, idx, p.shape.n_latents) @ column,
        "embedding_bag": lambda: embedding_bag(idx, column, per_sample_weights=vals, mode="sum"),
        SARM: lambda: ops.sparse_value(vals, idx, p.head),
    }


def gather_sum(p: Problem) -> Candidates:
    """The decoder."""
    vals, idx = p.latents
    cast = vals.to(p.dtype)
    return {
        **copy_floor(p, "gather_sum"),
        PUBLISHED: lambda: baselines.scatter_dense(cast, idx, p.shape.n_latents) @ p.w_enc,
        "embedding_bag": lambda: embedding_bag(idx, p.w_enc, per_sample_weights=cast, mode="sum"),
        SARM: lambda: ops.gather_sum(vals, idx, p.w_enc),
    }


def gather_dot(p: Problem) -> Candidates:
    """Products with the active latents."""
    _, idx = p.latents
    return {
        **copy_floor(p, "gather_dot"),
        PUBLISHED: lambda: (p.x @ p.w_enc.t()).gather(1, idx),
        "gather, bmm": lambda: torch.bmm(p.w_enc[idx], p.x.unsqueeze(2)).squeeze(2),
        SARM: lambda: ops.gather_dot(p.x, idx, p.w_enc),
    }


def scatter_outer(p: Problem) -> Candidates:
    """A weight gradient, in the weights' dtype."""
    vals, idx = p.latents
    cast, n_latents = vals.to(p.dtype), p.shape.n_latents

    def index_add() -> Tensor:  # as sparsify's encoder: (N, k, d_model) products
        products = (cast.unsqueeze(2) * p.x.unsqueeze(1)).flatten(0, 1)
        return p.x.new_zeros(n_latents, p.shape.d_model).index_add_(0, idx.flatten(), products)

    return {
        **copy_floor(p, "scatter_outer"),
        PUBLISHED: lambda: baselines.scatter_dense(cast, idx, n_latents).t() @ p.x,
        "index_add": index_add,
        SARM: lambda: ops.scatter_outer(vals, idx, p.x, n_latents, p.dtype),
    }


CASES: dict[str, Callable[[Problem], Candidates]] = {
    "topk_encode": topk_encode,
    "sae_step": sae_step,
    "encode_value": encode_value,
    "sparse_value": sparse_value,
    "gather_sum": gather_sum,
    "gather_dot": gather_dot,
    "scatter_outer": scatter_outer,
}


def build(
    case: str, shape: Shape, dtype: str, device: str, name: str
) -> Callable[[], Any] | Missing:
    """One call alone, for a process of its own."""
    return CASES[case](Problem(shape, dtype, device))[name]
