"""scatter_outer: weight gradients of encoder and decoder, grouped by latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch
from sarm.ops.reference import accumulate_dtype

OP = "scatter_outer"


def scatter_outer(
    a: Tensor, idx: Tensor, y: Tensor, n_latents: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Sums of rows by latent:  out[l] = sum over (n, j) with idx[n, j] = l of a[n, j] y[n].

    Equals scatter(a, idx).T @ y without the dense (N, n_latents) activations. Entries are grouped
    by latent with a stable sort and summed in the order of the tokens: no float atomics, so the
    result is the same in every run and for any number of threads.

    Args:
        a: (N, k) fp32 (fp64 for fp64 y).
        idx: (N, k) int64 in [0, n_latents). An index may occur several times in a row.
        y: (N, d_model) fp32 | bf16 | fp16 | fp64.
        n_latents: rows of the result, >= 1.
        dtype: of the result. Default: fp32 (fp64 for fp64 y), whatever the 16-bit dtype of y, so
            that gradients can be accumulated before they are rounded. The dtype of y is the other
            choice: the sums are still taken in fp32 and rounded once, and the fp32 matrix, twice
            the size, is never written.

    Returns:
        (n_latents, d_model), dtype. Latents without entries: zeros.

    Raises:
        ValueError: shapes, devices, n_latents; idx out of range (checked on the CPU, undefined on
            a GPU).
        TypeError: dtypes; a dtype that is neither the default nor y's.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Differentiable in a (gather_dot) and y (gather_sum). Deterministic on every backend.
    """
    return torch.ops.sarm.scatter_outer(a, idx, y, n_latents, dtype)


def _check(
    a: Tensor, idx: Tensor, y: Tensor, n_latents: int, dtype: torch.dtype | None
) -> torch.dtype:
    """Checks the arguments; returns the dtype of the result."""
    checks.check_matrix(OP, "y", y)
    checks.check_latents(OP, "a", a, idx)
    if y.shape[0] != idx.shape[0]:
        raise ValueError(
            f"{OP}: y and idx must have one number of rows, "
            f"got shapes {tuple(y.shape)} and {tuple(idx.shape)}"
        )
    if n_latents < 1:
        raise ValueError(f"{OP}: n_latents must be >= 1, got {n_latents}")
    checks.check_dtype(OP, "a", a, accumulate_dtype(y.dtype), f"y is {y.dtype}")
    checks.check_device(OP, a=a, idx=idx, y=y)
    if dtype not in (None, a.dtype, y.dtype):
        expected = " | ".join(dict.fromkeys(checks.name_of(t.dtype) for t in (a, y)))
        raise TypeError(f"{OP}: dtype must be {expected}, got {checks.name_of(dtype)}")
    return a.dtype if dtype is None else dtype


@torch.library.custom_op(
    "sarm::scatter_outer",
    mutates_args=(),
    schema="(Tensor a, Tensor idx, Tensor y, SymInt n_latents, ScalarType? dtype=None) -> Tensor",
)
def _op(
    a: Tensor, idx: Tensor, y: Tensor, n_latents: int, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = _check(a, idx, y, n_latents, dtype)
    checks.check_range(OP, idx, n_latents)
    run = dispatch.select(OP, a, idx, y)
    return run(a.contiguous(), idx.contiguous(), y.contiguous(), n_latents, dtype)


@_op.register_fake
def _fake(
    a: Tensor, idx: Tensor, y: Tensor, n_latents: int, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = _check(a, idx, y, n_latents, dtype)
    return a.new_empty((n_latents, y.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # d_a[n, j] = <y[n], d_out[idx[n, j]]>
    # d_y[n]    = sum_j a[n, j] d_out[idx[n, j]]
    a, idx, y = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    d_a = d_y = None
    if ctx.needs_input_grad[0]:
        d_a = torch.ops.sarm.gather_dot(y.to(d_out.dtype), idx, d_out)
    if ctx.needs_input_grad[2]:
        d_y = torch.ops.sarm.gather_sum(a, idx, d_out).to(y.dtype)
    return d_a, None, d_y, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register(OP)
