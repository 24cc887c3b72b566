"""topk_encode: the SAE encoder, topk(x @ w_enc.T + b_enc, k), without the dense product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch
from sarm.ops.reference import accumulate_dtype

OP = "topk_encode"


class SparseLatents(NamedTuple):
    """The k active latents of every token: vals (N, k) fp32, descending; idx (N, k) int64."""

    vals: Tensor
    idx: Tensor


def topk_encode(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, relu: bool = False
) -> SparseLatents:
    """The k largest pre-activations of every row:  topk(x @ w_enc.T + b_enc, k).

    The (N, n_latents) product is never stored: extra memory is O(N * k) plus a tile of <= 64 MiB.
    Products are summed in fp32 (fp64 for fp64 inputs). The selection is signed: negative values
    may be among the k largest. NaN ranks highest, as in torch.topk. Under autocast x and w_enc
    are cast to its dtype; vals stay fp32. On the CPU a row has the same bits in every batch and
    for any number of threads.

    A bias of -inf switches a latent off (AuxK chooses among dead latents so). Where fewer than k
    are on, vals hold -inf, which gather_sum would multiply: mask them, or use relu=True.

    Args:
        x: (N, d_model) fp32 | bf16 | fp16 | fp64.
        w_enc: (n_latents, d_model), x.dtype.
        b_enc: (n_latents,) fp32 (fp64 for fp64 x).
        k: 1 <= k <= n_latents.
        relu: clamp the selected values at 0. Indices stay; clamped values get no gradient.

    Returns:
        vals (N, k) fp32 (fp64 for fp64 x), descending; idx (N, k) int64. Equal values: lowest
        index first.

    Raises:
        ValueError: shapes, devices or k.
        TypeError: dtypes.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Differentiable in x, w_enc and b_enc through the selected values; its backward is gather_sum
    and scatter_outer. Deterministic on every backend.
    Source: arXiv 2406.04093 (TopK), arXiv 2508.08746 eq. 3.
    """
    return SparseLatents(*torch.ops.sarm.topk_encode(x, w_enc, b_enc, k, relu))


def _check(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> None:
    checks.check_matrix(OP, "x", x)
    checks.check_matrix(OP, "w_enc", w_enc)
    if x.shape[1] != w_enc.shape[1]:
        raise ValueError(
            f"{OP}: x and w_enc must have one d_model, "
            f"got shapes {tuple(x.shape)} and {tuple(w_enc.shape)}"
        )
    if b_enc.dim() != 1 or b_enc.shape[0] != w_enc.shape[0]:
        raise ValueError(
            f"{OP}: b_enc must have shape (n_latents={w_enc.shape[0]},), got {tuple(b_enc.shape)}"
        )
    if not 1 <= k <= w_enc.shape[0]:
        raise ValueError(f"{OP}: k must be in [1, n_latents={w_enc.shape[0]}], got {k}")
    checks.check_dtype(OP, "w_enc", w_enc, x.dtype, "the dtype of x")
    checks.check_dtype(OP, "b_enc", b_enc, accumulate_dtype(x.dtype), "x is summed in it")
    checks.check_device(OP, x=x, w_enc=w_enc, b_enc=b_enc)


@torch.library.custom_op(
    "sarm::topk_encode",
    mutates_args=(),
    schema="(Tensor x, Tensor w_enc, Tensor b_enc, SymInt k, bool relu=False) -> (Tensor, Tensor)",
)
def _op(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    _check(x, w_enc, b_enc, k)
    run = dispatch.select(OP, x, w_enc, b_enc)
    return run(x.contiguous(), w_enc.contiguous(), b_enc.contiguous(), k, relu)


@_op.register_fake
def _fake(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool = False
) -> tuple[Tensor, Tensor]:
    _check(x, w_enc, b_enc, k)
    vals = x.new_empty((x.shape[0], k), dtype=accumulate_dtype(x.dtype))
    return vals, x.new_empty((x.shape[0], k), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_enc, _, _, relu = inputs
    vals, idx = output
    ctx.relu = relu
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_enc, idx, vals if relu else None)


def _backward(ctx: Any, d_vals: Tensor | None, d_idx: None) -> tuple[Tensor | None, ...]:
    # vals[n, j] = <x[n], w_enc[l]> + b_enc[l]  with l = idx[n, j], hence
    #   d_x[n]     = sum_j d_vals[n, j] w_enc[l]
    #   d_w_enc[l] = sum over (n, j) with idx[n, j] = l of d_vals[n, j] x[n];  d_b_enc: x[n] = 1
    if d_vals is None:
        return None, None, None, None, None
    x, w_enc, idx, vals = ctx.saved_tensors
    if ctx.relu:
        d_vals = d_vals.masked_fill(vals == 0, 0.0)
    ops, n_latents = torch.ops.sarm, w_enc.shape[0]
    d_x = d_w_enc = d_b_enc = None
    if ctx.needs_input_grad[0]:
        d_x = ops.gather_sum(d_vals, idx, w_enc)
    if ctx.needs_input_grad[1]:
        d_w_enc = ops.scatter_outer(d_vals, idx, x, n_latents, w_enc.dtype)
    if ctx.needs_input_grad[2]:
        ones = d_vals.new_ones((x.shape[0], 1))
        d_b_enc = ops.scatter_outer(d_vals, idx, ones, n_latents).squeeze(1)
    return d_x, d_w_enc, d_b_enc, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register(OP, cast=(0, 1))  # x and w_enc; b_enc has to stay fp32
