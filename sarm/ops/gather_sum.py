"""gather_sum: the SAE decoder on the k active latents, and d_x of topk_encode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch
from sarm.ops.reference import accumulate_dtype

OP = "gather_sum"


def gather_sum(vals: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    """Weighted sum of the rows of the active latents:  out[n] = sum_j vals[n, j] w[idx[n, j]].

    Equals scatter(vals, idx) @ w, but reads k rows of w per token and builds neither the dense
    (N, n_latents) activations nor the gathered (N, k, d_model) rows.

    Args:
        vals: (N, k) fp32 (fp64 for fp64 w), finite: -inf * 0 is NaN.
        idx: (N, k) int64 in [0, n_latents).
        w: (n_latents, d_model) fp32 | bf16 | fp16 | fp64.

    Returns:
        (N, d_model), w.dtype; summed in fp32 (fp64 for fp64 w) and rounded once.

    Raises:
        ValueError: shapes, devices; idx out of range (checked on the CPU, undefined on a GPU).
        TypeError: dtypes.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Differentiable in vals (gather_dot) and w (scatter_outer). Deterministic on every backend.
    """
    return torch.ops.sarm.gather_sum(vals, idx, w)


def _check(vals: Tensor, idx: Tensor, w: Tensor) -> None:
    checks.check_matrix(OP, "w", w)
    checks.check_latents(OP, "vals", vals, idx)
    checks.check_dtype(OP, "vals", vals, accumulate_dtype(w.dtype), f"w is {w.dtype}")
    checks.check_device(OP, vals=vals, idx=idx, w=w)


@torch.library.custom_op(
    "sarm::gather_sum", mutates_args=(), schema="(Tensor vals, Tensor idx, Tensor w) -> Tensor"
)
def _op(vals: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    _check(vals, idx, w)
    checks.check_range(OP, idx, w.shape[0])
    run = dispatch.select(OP, vals, idx, w)
    return run(vals.contiguous(), idx.contiguous(), w.contiguous())


@_op.register_fake
def _fake(vals: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    _check(vals, idx, w)
    return w.new_empty((vals.shape[0], w.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # d_vals[n, j] = <d_out[n], w[idx[n, j]]>
    # d_w[l]       = sum over (n, j) with idx[n, j] = l of vals[n, j] d_out[n]
    vals, idx, w = ctx.saved_tensors
    d_vals = d_w = None
    if ctx.needs_input_grad[0]:
        d_vals = torch.ops.sarm.gather_dot(d_out, idx, w)
    if ctx.needs_input_grad[2]:
        d_w = torch.ops.sarm.scatter_outer(vals, idx, d_out, w.shape[0], w.dtype)
    return d_vals, None, d_w


_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register(OP)
