"""quantize_rows: rows of activations (or of a weight) to int8, one scale a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sarm.ops import autocast, checks, dispatch, inference

OP = "quantize_rows"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedRows(NamedTuple):
    """Rows as integers: q (N, d) int8 in [-127, 127]; scale (N,) fp32; row n is q[n] * scale[n]."""

    q: Tensor
    scale: Tensor


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Symmetric 8-bit rows:  scale = absmax(x[n]) / 127,  q = round(x[n] * (127 / absmax(x[n]))).

    All in fp32, each operation rounded; half rounds to even. A row depends on nothing but itself.
    Applied to a weight (out, in) it gives int8_linear's per-channel weight.

    Args:
        x: (N, d) fp32 | bf16 | fp16.

    Returns:
        q (N, d) int8 in [-127, 127]; scale (N,) fp32. A row of zeros (or below 2^-120) has q = 0
        and scale 0. A row with a NaN or an infinity has q = 0 and scale NaN, so that whatever is
        computed from it is NaN and never a plausible number.

    Raises:
        ValueError: shape.
        TypeError: dtype.
        BackendUnavailableError: a backend was chosen by name and cannot run.

    Not differentiable. Deterministic, and the same bits on every backend.
    """
    return QuantizedRows(*torch.ops.sarm.quantize_rows(x))


def check_rows(op: str, name: str, x: Tensor) -> None:
    """A matrix of a dtype that can be quantised."""
    checks.check_matrix(op, name, x)
    if x.dtype not in DTYPES:
        expected = " | ".join(map(checks.name_of, DTYPES))
        raise TypeError(f"{op}: {name} must be {expected}, got {checks.name_of(x.dtype)}")


def empty_rows(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Fake q (N, d) and scale (N,) for the rows of x."""
    n = x.shape[0]
    return x.new_empty((n, d), dtype=torch.int8), x.new_empty((n,), dtype=torch.float32)


@torch.library.custom_op(
    "sarm::quantize_rows", mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
)
def _op(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(OP, "x", x)
    return dispatch.select(OP, x)(x.contiguous())


@_op.register_fake
def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(OP, "x", x)
    return empty_rows(x, x.shape[1])


inference.only(_op, OP)
autocast.register(OP)
