"""Triton kernel of gather_dot:  out[n, j] = <y[n], w[idx[n, j]]>.

When each row of w is needed by several tokens, d_model is taken in slices that stay in the L2
(kernels/slices.py), one launch after the other, each adding its part to out: a fixed order, no
atomics, no partial results in memory. Otherwise one launch does all. Within a launch a dot product
grows by one BLOCK_D after the other as well, so both give the same bits, and a row's result does
not depend on how many rows there are.

    N  tokens      K  active latents      L  latents      D  d_model
    y_ptr (N, D)      idx_ptr, out_ptr (N, K)      w_ptr (L, D)      all row-major
    BLOCK_K, BLOCK_D: rows of w x width of the slice, held in registers
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm.kernels.form import Build, Builds, Form
from sarm.kernels.slices import L2_BYTES, NUM_WARPS, TILE, WIDTHS, slice_width


@triton.jit(do_not_specialize=["begin", "end"])
def gather_dot_kernel(
    y_ptr, idx_ptr, w_ptr, out_ptr, K, D, begin, end, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: BLOCK_K dot products of one token, columns begin to end."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    idx = tl.load(idx_ptr + n * K + j, mask=j < K, other=0)
    out_ptr += n * K
    total = tl.load(out_ptr + j, mask=j < tl.where(begin > 0, K, 0), other=0.0)
    for first in range(begin, end, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        y = tl.load(y_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = (j < K)[:, None] & (d < D)[None, :]
        w = tl.load(w_ptr + idx[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += tl.sum(y[None, :] * w.to(tl.float32), axis=1)
    tl.store(out_ptr + j, total, mask=j < K)


def gather_dot_form(width: int) -> Form:
    """For slices of that width."""
    # At most 16 rows: the sum over d leaves a number for each row in all of its threads.
    constants = {"BLOCK_K": min(TILE // width, 16), "BLOCK_D": width}
    # As in gather_sum: 24 warps keep 96 KiB in flight an SM.
    return Form(gather_dot_kernel, constants, NUM_WARPS, warps_per_sm=24)


def gather_dot(y: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    """Launch on contiguous y (N, d), idx (N, k) int64, w (n_latents, d) of y's dtype.

    Indices are not checked: the caller guarantees 0 <= idx < n_latents.
    """
    (n, k), (n_latents, d_model) = idx.shape, w.shape
    out = w.new_empty((n, k), dtype=torch.float32)
    width = slice_width(n_latents, d_model, w.element_size())
    reused = n * k >= 2 * n_latents and w.numel() * w.element_size() > L2_BYTES
    step = width if reused else max(d_model, 1)
    form = gather_dot_form(width)
    grid = (n, triton.cdiv(k, form.constants["BLOCK_K"]))
    for begin in range(0, max(d_model, 1), step):  # d_model = 0: one launch writes zeros
        end = min(begin + step, d_model)
        form.launch(grid, y, idx, w, out, k, d_model, begin, end)
    return out


def builds(capability: int) -> Builds:
    """Every width, with 16-bit and fp32 weights."""
    for dtype in ("bf16", "fp32"):
        types = {"y_ptr": f"*{dtype}", "idx_ptr": "*i64", "w_ptr": f"*{dtype}"}
        types |= {"out_ptr": "*fp32", **dict.fromkeys(("K", "D", "begin", "end"), "i32")}
        for width in WIDTHS:
            yield Build(f"gather_dot {width}", gather_dot_form(width), types, ("D",))
