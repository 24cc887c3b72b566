"""Triton kernel: a tile of x @ w_enc.T + b_enc that leaves the registers as selection keys only.

One program computes BLOCK_N x BLOCK_L pre-activations on the tensor cores and then either

    DENSE      writes all of them as keys (the caller bounds the size of the buffer), or
    otherwise  writes the T best of every row of the tile: candidates, with their columns.

If a row's k best latents include fewer than T of every tile, they are all among the candidates.
kernels/select_keys.py checks just that.

    N  rows of this chunk      L  latents      D  d_model      T  candidates of a row in a tile
    x_ptr (N, D)      w_ptr (L, D)      b_ptr (L,)      all row-major
    keys_ptr (N, L), or (N, tiles, T) with cols_ptr, the column in the tile, of the same shape

What an element (one pre-activation) costs an H100, for d_model = 4096, n_latents = 65536, k = 192,
hence T = 6, by arithmetic: nothing here was timed. A clock of one of its 132 SMs: 2048 bf16
multiply-adds on the tensor cores, 128 lanes of issue, 64 lanes of integer compare and min/max, and
24 to 39 bytes from the L2 (5.5 TB/s as measured by others, 9 TB/s on paper).
    products     4096 multiply-adds: 2.0 clocks.
    L2           a tile of 256 x 128 reads 384 rows of 8 KiB, 96 bytes an element: 2.5 to 4 clocks,
                 so this bounds the loop. 128 x 128 would read 128 bytes: 3.3 to 5.3 clocks.
    memory       GROUP_N row tiles visit one w tile in turn, so w (537 MB, 0.18 ms) comes from
                 memory once per GROUP_N * 256 rows, whose products take 1.1 ms at full speed.
    epilogue     T passes of about 5 integer operations (compare, tie, two selects, removal): 30,
                 0.25 clocks of issue and 0.5 of the integer pipe. The one program that an SM has
                 room for does not hide it: 12 to 20 % of the loop. Two resident programs of
                 128 x 128 would, at 0.8 to 1.3 clocks more of L2. It does not shrink with d_model:
                 below 1024 it takes as long as the products.
    writes       6 * (4 + 1) bytes for every 128 latents, 15 KiB a row; bf16 pre-activations are
                 128 KiB, written and read again.
    small N      one row tile of 16 or 64: 512 programs read w once, 0.18 ms; a tile's epilogue and
                 x from the L2 are hidden by the other programs on the SM (6, or 3).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from sarm.kernels.form import Build, Builds, Form
from sarm.kernels.keys import PAD, key_of

BLOCK_L = 128  # the column of a candidate is a byte, so at most 256
GROUP_N = 8


@triton.jit(do_not_specialize=["T"])
def encode_tiles_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    keys_ptr,
    cols_ptr,
    N,
    L,
    D,
    T,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    DENSE: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """One program: BLOCK_N rows, BLOCK_L latents. UPCAST: the interpreter's bf16 dot is broken."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_l = tl.cdiv(L, BLOCK_L)
    i = tl.program_id(0)
    tile_n, tile_l = tl.swizzle2d(i // tiles_l, i % tiles_l, tiles_n, tiles_l, GROUP_N)
    first_n = tile_n * BLOCK_N
    first_l = tile_l * BLOCK_L
    row = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)

    # 64-bit tile origins, 32-bit offsets inside (BLOCK * D < 2^31): half the address registers.
    # Rows and latents past the end read the last one: no mask in the loop but that of d.
    x_ptr += first_n.to(tl.int64) * D
    w_ptr += first_l.to(tl.int64) * D
    x_offset = tl.minimum(row, N - 1 - first_n)[:, None] * D + d[None, :]
    w_offset = tl.minimum(col, L - 1 - first_l)[None, :] * D + d[:, None]
    pre = tl.zeros((BLOCK_N, BLOCK_L), dtype=tl.float32)
    for first_d in range(0, D, BLOCK_D):
        d_mask = d < D - first_d
        x = tl.load(x_ptr + x_offset, mask=d_mask[None, :], other=0.0)
        w = tl.load(w_ptr + w_offset, mask=d_mask[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        pre = tl.dot(x, w, pre, input_precision="ieee")  # fp32 stays fp32: no TF32
        x_ptr += BLOCK_D
        w_ptr += BLOCK_D

    l_mask = first_l + col < L
    b = tl.load(b_ptr + first_l + col, mask=l_mask, other=0.0)
    key = tl.where(l_mask[None, :], key_of(pre + b[None, :]), PAD)
    n_mask = first_n + row < N
    if DENSE:
        keys_ptr += first_n.to(tl.int64) * L + first_l
        offset = row[:, None] * L + col[None, :]
        tl.store(keys_ptr + offset, key, mask=n_mask[:, None] & l_mask[None, :])
    else:
        first = (first_n.to(tl.int64) * tiles_l + tile_l) * T
        offset = row * (tiles_l * T)
        for t in range(T):
            best, best_col = tl.max(key, axis=1, return_indices=True)  # ties: the lowest column
            tl.store(keys_ptr + first + offset + t, best, mask=n_mask)
            tl.store(cols_ptr + first + offset + t, best_col.to(tl.uint8), mask=n_mask)
            key = tl.where(col[None, :] == best_col[:, None], PAD, key)


class Tile(NamedTuple):
    """What differs between the forms."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    warps_per_sm: int


# For at most so many rows: the tile. No form spills; registers leave room for the stated warps.
# 16 and 64 rows read w once, or once per 64 rows from L2: bound by memory, which two programs of
# 4 warps saturate, each with a stage of 16 KiB of w on its way.
_FEW: dict[int | None, Tile] = {16: Tile(16, 64, 4, 3, 8), 128: Tile(64, 64, 4, 3, 8)}
_MANY = {
    # Two programs of 4 warps, 128 accumulators a thread: one computes while the other selects.
    None: Tile(128, 32, 4, 4, 8),
    # H100: one program of 8 warps, 128 accumulators a thread. A 128 x 128 tile needs 64 bytes of
    # L2 a clock for full tensor cores, and an SM gets 24 to 39 (5.5 to 9 TB/s); 256 x 128 needs 48.
    # That is worth more than the hidden epilogue of a second program. 4 stages: 192 of 227 KiB.
    90: Tile(256, 64, 8, 4, 8),
    100: Tile(128, 64, 4, 3, 8),
}
# Full fp32 has no tensor cores: 64 accumulators a thread, and a short BLOCK_D, because every thread
# holds its BLOCK_D-wide slices of both operands in registers.
_FP32 = {16: Tile(16, 16, 4, 3, 16), None: Tile(64, 8, 4, 3, 8)}
# 16-bit rows that are not 16-byte aligned come in 2-byte loads through registers, so short slices.
_UNALIGNED = {16: Tile(16, 32, 4, 1, 8), None: Tile(64, 32, 4, 1, 8)}


def encode_form(
    capability: int, itemsize: int, rows: int, d_model: int, dense: bool, upcast: bool = False
) -> Form:
    """The form for a chunk of `rows` rows whose x and w have `itemsize` bytes an element."""
    if itemsize == 4:
        tiles = _FP32
    elif d_model % 16:  # Triton looks for a divisor of 16 elements
        tiles = _UNALIGNED
    else:
        tiles = {**_FEW, None: _MANY.get(capability, _MANY[None])}
    tile = next(tile for most, tile in tiles.items() if most is None or rows <= most)
    constants = {
        "BLOCK_N": tile.block_n,
        "BLOCK_L": BLOCK_L,
        "BLOCK_D": tile.block_d,
        "GROUP_N": GROUP_N,
        "DENSE": dense,
        "UPCAST": upcast,
    }
    return Form(
        encode_tiles_kernel,
        constants,
        tile.num_warps,
        tile.warps_per_sm,
        num_stages=tile.num_stages,
    )


def builds(capability: int) -> Builds:
    """All that the launcher can ask for on this architecture; fp16 is the same code as bf16."""
    for dtype, d_model in (("bf16", 4096), ("fp32", 4096), ("bf16", 65)):
        pointer, itemsize = f"*{dtype}", 4 if dtype == "fp32" else 2
        types = {"x_ptr": pointer, "w_ptr": pointer, "b_ptr": "*fp32", "keys_ptr": "*i32"}
        types |= {"cols_ptr": "*u8", **dict.fromkeys("NLDT", "i32")}
        for dense in (False, True):
            forms = {}
            for rows in (16, 64, 4096):
                form = encode_form(capability, itemsize, rows, d_model, dense)
                forms[form.constants["BLOCK_N"]] = form
            for block_n, form in forms.items():
                label = (
                    f"encode_tiles {block_n} rows{' dense' * dense}{', odd d' * (d_model == 65)}"
                )
                aligned = () if d_model % 16 else ("D",)
                yield Build(label, form, types, aligned, tensor_cores=itemsize == 2)
