"""gather_dot: the pre-activations of given latents only, and d_vals of the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch
from sarm.ops.reference import accumulate_dtype

OP = "gather_dot"


def gather_dot(y: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    """Dot products with the rows of the active latents:  out[n, j] = <y[n], w[idx[n, j]]>.

    Equals (y @ w.T).gather(1, idx), but computes only the k wanted products of a token.

    Args:
        y: (N, d_model), w.dtype.
        idx: (N, k) int64 in [0, n_latents).
        w: (n_latents, d_model) fp32 | bf16 | fp16 | fp64.

    Returns:
        (N, k) fp32 (fp64 for fp64 w).

    Raises:
        ValueError: shapes, devices; idx out of range (checked on the CPU, undefined on a GPU).
        TypeError: dtypes.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Differentiable in y (gather_sum) and w (scatter_outer). Deterministic on every backend.
    """
    return torch.ops.sarm.gather_dot(y, idx, w)


def _check(y: Tensor, idx: Tensor, w: Tensor) -> None:
    checks.check_matrix(OP, "y", y)
    checks.check_matrix(OP, "w", w)
    checks.check_idx(OP, idx)
    if y.shape[1] != w.shape[1]:
        raise ValueError(
            f"{OP}: y and w must have one d_model, got shapes {tuple(y.shape)} and {tuple(w.shape)}"
        )
    if y.shape[0] != idx.shape[0]:
        raise ValueError(
            f"{OP}: y and idx must have one number of rows, "
            f"got shapes {tuple(y.shape)} and {tuple(idx.shape)}"
        )
    checks.check_dtype(OP, "y", y, w.dtype, "the dtype of w")
    checks.check_device(OP, y=y, idx=idx, w=w)


@torch.library.custom_op(
    "sarm::gather_dot", mutates_args=(), schema="(Tensor y, Tensor idx, Tensor w) -> Tensor"
)
def _op(y: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    _check(y, idx, w)
    checks.check_range(OP, idx, w.shape[0])
    run = dispatch.select(OP, y, idx, w)
    return run(y.contiguous(), idx.contiguous(), w.contiguous())


@_op.register_fake
def _fake(y: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    _check(y, idx, w)
    return y.new_empty((y.shape[0], idx.shape[1]), dtype=accumulate_dtype(y.dtype))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # d_y[n] = sum_j d_out[n, j] w[idx[n, j]]
    # d_w[l] = sum over (n, j) with idx[n, j] = l of d_out[n, j] y[n]
    y, idx, w = ctx.saved_tensors
    d_y = d_w = None
    if ctx.needs_input_grad[0]:
        d_y = torch.ops.sarm.gather_sum(d_out, idx, w)
    if ctx.needs_input_grad[2]:
        d_w = torch.ops.sarm.scatter_outer(d_out, idx, y, w.shape[0], w.dtype)
    return d_y, None, d_w


_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register(OP)
