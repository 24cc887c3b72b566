"""Triton kernel of gather_sum:  out[n] = sum_j vals[n, j] * w[idx[n, j]].

One program owns one token and one slice of d_model. The grid's slow axis is the slice, so that w's
slice stays in the L2 while all tokens pass (kernels/slices.py); vals and idx are read once a slice,
2 % of the gathered bytes.

    N  tokens      K  active latents      L  latents      D  d_model
    vals_ptr, idx_ptr (N, K)      w_ptr (L, D)      out_ptr (N, D)      all row-major
    BLOCK_K, BLOCK_D: rows of w x width of the slice, held in registers
"""

import triton
import triton.language as tl
from torch import Tensor

from sarm.kernels.form import Build, Builds, Form, kernel_dtype
from sarm.kernels.slices import NUM_WARPS, TILE, WIDTHS, slice_width


@triton.jit
def gather_sum_kernel(
    vals_ptr, idx_ptr, w_ptr, out_ptr, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: one token, BLOCK_D columns. BLOCK_K partial sums are added at the end."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        idx = tl.load(idx_ptr + n * K + j, mask=j < K, other=0)
        vals = tl.load(vals_ptr + n * K + j, mask=j < K, other=0.0)
        mask = (j < K)[:, None] & (d < D)[None, :]
        w = tl.load(w_ptr + idx[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += vals[:, None] * w.to(tl.float32)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * D + d, out, mask=d < D)


def gather_sum_form(width: int) -> Form:
    """For slices of that width."""
    constants = {"BLOCK_K": TILE // width, "BLOCK_D": width}
    # Each warp has 8 rows of 16-byte loads on their way: 24 warps keep 96 KiB in flight an SM.
    return Form(gather_sum_kernel, constants, NUM_WARPS, warps_per_sm=24)


def gather_sum(vals: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    """Launch on contiguous vals (N, k) fp32, idx (N, k) int64, w (n_latents, d).

    Indices are not checked: the caller guarantees 0 <= idx < n_latents.
    """
    (n, k), (n_latents, d_model) = vals.shape, w.shape
    out = w.new_empty((n, d_model), dtype=kernel_dtype(w.dtype, w))
    width = slice_width(n_latents, d_model, w.element_size())
    grid = (n, triton.cdiv(d_model, width))
    gather_sum_form(width).launch(grid, vals, idx, w, out, k, d_model)
    return out.to(w.dtype)


def builds(capability: int) -> Builds:
    """Every width, with 16-bit and fp32 weights."""
    for dtype in ("bf16", "fp32"):
        types = {"vals_ptr": "*fp32", "idx_ptr": "*i64", "w_ptr": f"*{dtype}"}
        types |= {"out_ptr": f"*{dtype}", "K": "i32", "D": "i32"}
        for width in WIDTHS:
            yield Build(f"gather_sum {width}", gather_sum_form(width), types, ("D",))
