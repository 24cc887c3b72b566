"""sparse_value: the gather-dot value head, P heads or steering profiles in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch
from sarm.ops.reference import accumulate_dtype

OP = "sparse_value"


def sparse_value(vals: Tensor, idx: Tensor, w_head: Tensor) -> Tensor:
    """Linear heads over sparse latents:  out[n, p] = sum_j vals[n, j] w_head[p, idx[n, j]].

    The dense (N, n_latents) activations are never built: the cost is O(N * k * P).

    Args:
        vals: (N, k) fp32 (fp64 for fp64 w_head).
        idx: (N, k) int64 in [0, n_latents).
        w_head: (P, n_latents) fp32 | bf16 | fp16 | fp64.

    Returns:
        (N, P), vals.dtype.

    Raises:
        ValueError: shapes, devices; idx out of range (checked on the CPU, undefined on a GPU).
        TypeError: dtypes.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Differentiable in vals and w_head. Deterministic on every backend, and a row's value does not
    depend on the other rows. Source: arXiv 2508.08746 eq. 4.
    """
    return torch.ops.sarm.sparse_value(vals, idx, w_head)


def _check(vals: Tensor, idx: Tensor, w_head: Tensor) -> None:
    checks.check_matrix(OP, "w_head", w_head)
    checks.check_latents(OP, "vals", vals, idx)
    checks.check_dtype(
        OP, "vals", vals, accumulate_dtype(w_head.dtype), f"w_head is {w_head.dtype}"
    )
    checks.check_device(OP, vals=vals, idx=idx, w_head=w_head)


@torch.library.custom_op(
    "sarm::sparse_value",
    mutates_args=(),
    schema="(Tensor vals, Tensor idx, Tensor w_head) -> Tensor",
)
def _op(vals: Tensor, idx: Tensor, w_head: Tensor) -> Tensor:
    _check(vals, idx, w_head)
    checks.check_range(OP, idx, w_head.shape[1])
    run = dispatch.select(OP, vals, idx, w_head)
    return run(vals.contiguous(), idx.contiguous(), w_head.contiguous())


@_op.register_fake
def _fake(vals: Tensor, idx: Tensor, w_head: Tensor) -> Tensor:
    _check(vals, idx, w_head)
    return vals.new_empty((vals.shape[0], w_head.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # With w = w_head.T this is gather_sum(vals, idx, w):
    #   d_vals[n, j] = <d_out[n], w[idx[n, j]]>
    #   d_w[l]       = sum over (n, j) with idx[n, j] = l of vals[n, j] d_out[n]
    vals, idx, w_head = ctx.saved_tensors
    d_vals = d_w_head = None
    if ctx.needs_input_grad[0]:
        d_vals = torch.ops.sarm.gather_dot(d_out, idx, w_head.t().to(d_out.dtype))
    if ctx.needs_input_grad[2]:
        d_w = torch.ops.sarm.scatter_outer(vals, idx, d_out, w_head.shape[1])
        d_w_head = d_w.t().to(w_head.dtype)
    return d_vals, None, d_w_head


_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register(OP)
