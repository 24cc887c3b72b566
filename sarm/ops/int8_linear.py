"""int8_linear: a linear layer on quantised rows and weights, summed in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch, inference
from sarm.ops.quantize_rows import DTYPES

OP = "int8_linear"
#: Sums of this many products of any two int8 stay below 2^31.
MAX_COLUMNS = 2**17 - 1


def int8_linear(
    q: Tensor,
    scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[n, o] = (sum_i q[n, i] w_q[o, i]) * scale[n] * w_scale[o] + bias[o] + residual[n, o].

    The sum is exact (int32); then everything is fp32, from left to right, each operation rounded,
    and rounded to out_dtype once at the end. Integer sums have no order, hence a row has **the same
    bits** alone, in any batch, on any number of threads and on every backend.

    Args:
        q: (N, in) int8; in <= 131071, so that no int32 overflows whatever the values.
        scale: (N,) fp32, both from quantize_rows or a fused form of it.
        w_q: (out, in) int8.
        w_scale: (out,) fp32, both from quantize_rows(weight).
        bias: (out,) fp32, or None.
        residual: (N, out) fp32, or None.
        out_dtype: fp32 | bf16 | fp16.

    Returns:
        (N, out), out_dtype. NaN scales give NaN rows.

    Raises:
        ValueError: shapes, devices, too many columns.
        TypeError: dtypes.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Not differentiable. Worth it from a few rows on: on the CPU the weights are packed in every
    call, which costs as much as 8 rows.
    """
    return torch.ops.sarm.int8_linear(q, scale, w_q, w_scale, bias, residual, out_dtype)


def _check(
    q: Tensor,
    scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    for name, matrix in (("q", q), ("w_q", w_q)):
        if matrix.dim() != 2:
            shape = tuple(matrix.shape)
            raise ValueError(f"{OP}: {name} must have 2 dimensions, got shape {shape}")
        checks.check_dtype(OP, name, matrix, torch.int8, "quantised")
    if q.shape[1] != w_q.shape[1]:
        raise ValueError(
            f"{OP}: q and w_q must have one number of columns, "
            f"got shapes {tuple(q.shape)} and {tuple(w_q.shape)}"
        )
    if q.shape[1] > MAX_COLUMNS:
        raise ValueError(
            f"{OP}: q must have at most {MAX_COLUMNS} columns (int32 sums), got {q.shape[1]}"
        )
    n, out = q.shape[0], w_q.shape[0]
    for name, tensor, shape in (
        ("scale", scale, (n,)),
        ("w_scale", w_scale, (out,)),
        ("bias", bias, (out,)),
        ("residual", residual, (n, out)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{OP}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        checks.check_dtype(OP, name, tensor, torch.float32, "sums are scaled in it")
        checks.check_device(OP, q=q, **{name: tensor})
    checks.check_device(OP, q=q, w_q=w_q)
    if out_dtype not in DTYPES:
        expected = " | ".join(map(checks.name_of, DTYPES))
        raise TypeError(f"{OP}: out_dtype must be {expected}, got {checks.name_of(out_dtype)}")


@torch.library.custom_op(
    "sarm::int8_linear",
    mutates_args=(),
    schema="(Tensor q, Tensor scale, Tensor w_q, Tensor w_scale, Tensor? bias=None, "
    "Tensor? residual=None, ScalarType out_dtype=float32) -> Tensor",
)
def _op(
    q: Tensor,
    scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    _check(q, scale, w_q, w_scale, bias, residual, out_dtype)
    run = dispatch.select(OP, q, scale, w_q, w_scale)
    return run(
        q.contiguous(),
        scale.contiguous(),
        w_q.contiguous(),
        w_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(),
        out_dtype,
    )


@_op.register_fake
def _fake(
    q: Tensor,
    scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    _check(q, scale, w_q, w_scale, bias, residual, out_dtype)
    return q.new_empty((q.shape[0], w_q.shape[0]), dtype=out_dtype)


inference.only(_op, OP)
autocast.register(OP)
