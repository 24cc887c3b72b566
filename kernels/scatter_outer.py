"""Triton kernels of scatter_outer:  out[l] = sum over (n, j) with idx[n, j] = l of a[n, j] * y[n].

The N * K entries are sorted by latent (stable: in a latent's segment, tokens ascend), and one
program sums one segment in one slice of d_model: no atomics, every sum in a fixed order. The grid's
slow axis is the slice, so that y's slice stays in the L2 (kernels/slices.py).

A popular latent would keep its program busy long after all others are done, so segments of more
than PIECE entries are first summed piece by piece, in parallel, into rows of `partial`; the
latent's program then adds these rows in order. Where the pieces lie is known on the device only:
the grid has room for as many as there can be (2 E / PIECE: a piece that is not a segment's last is
full), and programs without a piece leave at once. Nothing waits for the device.

    E = N * K  entries      L  latents      D  d_model      N  tokens
    token_ptr, coef_ptr (E,)  in sorted order      begin_ptr (L + 1,)  where segments begin
    piece_end_ptr (L,)  pieces of latents 0..l      partial_ptr (pieces, D)  fp32
    y_ptr (N, D)      out_ptr (L, D)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm.kernels.form import Build, Builds, Form, kernel_dtype
from sarm.kernels.slices import NUM_WARPS, TILE, WIDTHS, slice_width

PIECE = 1024  # entries: 16 KiB of indices and 512 KiB of y for the busiest program of a slice
PARTIAL_BYTES = 64 * 2**20


@triton.jit
def sum_entries(
    first, end, token_ptr, coef_ptr, y_ptr, d, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sum over entries first to end of coef * y[token], columns d."""
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for block in range(first, end, BLOCK_E):
        e = block + tl.arange(0, BLOCK_E)
        token = tl.load(token_ptr + e, mask=e < end, other=0)
        coef = tl.load(coef_ptr + e, mask=e < end, other=0.0)
        mask = (e < end)[:, None] & (d < D)[None, :]
        y = tl.load(y_ptr + token.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += coef[:, None] * y.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def sum_rows(first, end, rows_ptr, d, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum over rows first to end of an fp32 matrix, columns d."""
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for block in range(first, end, BLOCK_E):
        r = block + tl.arange(0, BLOCK_E)
        mask = (r < end)[:, None] & (d < D)[None, :]
        total += tl.load(rows_ptr + r.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["piece"])
def sum_pieces_kernel(
    token_ptr,
    coef_ptr,
    begin_ptr,
    piece_end_ptr,
    piece_latent_ptr,
    y_ptr,
    partial_ptr,
    L,
    D,
    piece,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one piece of a long segment, BLOCK_D columns."""
    p = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    latent = tl.load(piece_latent_ptr + p)
    if latent < L:
        end = tl.load(begin_ptr + latent + 1)
        # Pieces left of this latent's, this one included, say how far from the segment's end.
        from_last = tl.load(piece_end_ptr + latent) - 1 - p
        begin = tl.load(begin_ptr + latent)
        pieces = tl.cdiv(end - begin, piece)
        first = begin + (pieces - 1 - from_last) * piece
        end = tl.minimum(first + piece, end)
        total = sum_entries(first, end, token_ptr, coef_ptr, y_ptr, d, D, BLOCK_E, BLOCK_D)
        tl.store(partial_ptr + p.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["piece"])
def sum_segments_kernel(
    token_ptr,
    coef_ptr,
    begin_ptr,
    piece_end_ptr,
    y_ptr,
    partial_ptr,
    out_ptr,
    D,
    piece,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one latent, BLOCK_D columns."""
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(begin_ptr + latent)
    end = tl.load(begin_ptr + latent + 1)
    if end - begin <= piece:
        total = sum_entries(begin, end, token_ptr, coef_ptr, y_ptr, d, D, BLOCK_E, BLOCK_D)
    else:
        last = tl.load(piece_end_ptr + latent)
        total = sum_rows(
            last - tl.cdiv(end - begin, piece), last, partial_ptr, d, D, BLOCK_E, BLOCK_D
        )
    tl.store(out_ptr + latent * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def scatter_form(kernel: triton.JITFunction, width: int) -> Form:
    """For slices of that width."""
    constants = {"BLOCK_E": TILE // width, "BLOCK_D": width}
    # 20 warps keep 80 KiB of y in flight an SM, more than an L2's latency times its bandwidth.
    return Form(kernel, constants, NUM_WARPS, warps_per_sm=20)


def scatter_outer(a: Tensor, idx: Tensor, y: Tensor, n_latents: int, dtype: torch.dtype) -> Tensor:
    """Launch on contiguous a (N, k) fp32, idx (N, k) int64, y (N, d).

    Indices are not checked: the caller guarantees 0 <= idx < n_latents.
    """
    (n, k), d_model, entries = idx.shape, y.shape[1], idx.numel()
    out = y.new_empty((n_latents, d_model), dtype=kernel_dtype(dtype, y))
    latent, order = idx.flatten().int().sort(stable=True)
    token = (order // max(k, 1)).int()
    coef = a.flatten()[order]
    latents = torch.arange(n_latents + 1, dtype=torch.int32, device=idx.device)
    begin = torch.searchsorted(latent, latents)

    # Long enough pieces that their sums fit PARTIAL_BYTES.
    piece = max(PIECE, triton.cdiv(2 * entries * d_model * 4, PARTIAL_BYTES))
    count = begin.diff()
    piece_end = torch.where(count > piece, (count + piece - 1) // piece, 0).cumsum(0)
    pieces = 2 * entries // piece if entries > piece else 0
    partial = y.new_empty((pieces, d_model), dtype=torch.float32)

    width = slice_width(n, d_model, y.element_size())
    slices = triton.cdiv(d_model, width)
    if pieces:
        numbers = torch.arange(pieces, device=idx.device)
        piece_latent = torch.searchsorted(piece_end, numbers, right=True)
        scatter_form(sum_pieces_kernel, width).launch(
            (pieces, slices),
            *(token, coef, begin, piece_end, piece_latent, y, partial, n_latents, d_model, piece),
        )
    scatter_form(sum_segments_kernel, width).launch(
        (n_latents, slices), token, coef, begin, piece_end, y, partial, out, d_model, piece
    )
    return out.to(dtype)


def builds(capability: int) -> Builds:
    """Every width, with 16-bit and fp32 y."""
    for dtype in ("bf16", "fp32"):
        types = {"token_ptr": "*i32", "coef_ptr": "*fp32", "begin_ptr": "*i64"}
        types |= {"piece_end_ptr": "*i64"}
        pieces = {**types, "piece_latent_ptr": "*i64", "y_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
        segments = {**types, "y_ptr": f"*{dtype}", "partial_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        for width in WIDTHS:
            form = scatter_form(sum_pieces_kernel, width)
            types = {**pieces, **dict.fromkeys(("L", "D", "piece"), "i32")}
            yield Build(f"sum_pieces {width}", form, types, ("D",))
            form = scatter_form(sum_segments_kernel, width)
            types = {**segments, **dict.fromkeys(("D", "piece"), "i32")}
            yield Build(f"sum_segments {width}", form, types, ("D",))
