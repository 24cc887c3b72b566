"""Launcher of topk_encode: tiles of x @ w_enc.T + b_enc to candidates, candidates to the top k.

Two routes, both exact and deterministic (no atomics):

    candidates  encode_tiles_kernel keeps the T best of every row in each tile of 128 latents;
                select_kernel picks the row's k best of these and checks that no tile can hold more
                (kernels/select_keys.py). T is chosen so that at most one row in 500 fails the
                check if a row's active latents fall anywhere. Rows that fail (concentrated,
                constant, all NaN) take the other route.
    all keys    the same kernel writes all keys of a few rows, and select_kernel reads them. For
                those rows, and for k so large a part of n_latents that candidates are no saving.

A row's result does not depend on the route: both take the same products in the same order, unless
the number of rows lets the second route use another tile shape.

Memory beyond the result: TILE_BYTES at any N, because rows are taken in chunks. Host
synchronisations: one for each call on the first route, which reads the failed rows; none on the
second.
"""

import functools
import math

import torch
import triton
from torch import Tensor

from sarm.kernels.encode_tiles import BLOCK_L, encode_form
from sarm.kernels.form import capability
from sarm.kernels.select_keys import MAX_RANKED, order_form, select_form

TILE_BYTES = 60 * 2**20  # of keys; with the rows that are gathered to be run again, 64 MiB
MAX_CANDIDATES = 24  # above, a tile's selection takes as long as its products at d_model = 4096
FAILED_ROWS = 2e-3


def topk_encode(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """Launch on contiguous x (N, d), w_enc (n_latents, d) of one dtype and b_enc (n_latents,) fp32.

    16-bit inputs use the tensor cores with fp32 sums; fp32 is multiplied in full fp32 (no TF32).
    """
    n, n_latents = x.shape[0], w_enc.shape[0]
    vals = x.new_empty((n, k), dtype=torch.float32)
    idx = x.new_empty((n, k), dtype=torch.int64)
    candidates = candidates_per_tile(n_latents, k)
    if n == 0:
        return vals, idx
    if candidates is None:
        _from_all_keys(x, w_enc, b_enc, relu, vals, idx)
        return vals, idx
    failed = x.new_empty((n,), dtype=torch.int32)
    _from_candidates(x, w_enc, b_enc, relu, vals, idx, candidates, failed)
    rows = rows_to_repeat(failed)
    step = max(1, 2 * 2**20 // (x.shape[1] * x.element_size() + 12 * k))  # gathered: 2 MiB
    for part in rows.split(step) if len(rows) else ():
        again = vals.new_empty((len(part), k)), idx.new_empty((len(part), k))
        _from_all_keys(x[part], w_enc, b_enc, relu, *again)
        vals[part], idx[part] = again
    return vals, idx


def rows_to_repeat(failed: Tensor) -> Tensor:
    """Rows whose candidates may miss a result. Waits for the device."""
    return failed.nonzero().squeeze(1)


@functools.cache
def candidates_per_tile(n_latents: int, k: int) -> int | None:
    """The smallest T for which a row fails its check in 1 of 500 cases; None: all keys.

    A tile fails when it holds T or more of the row's k active latents. With latents in random order
    their number is nearly Poisson with mean k * BLOCK_L / n_latents.
    """
    tiles, mean = triton.cdiv(n_latents, BLOCK_L), k * BLOCK_L / n_latents
    probability = math.exp(-mean)  # of t active latents
    tail = 1.0 - probability  # of more than t
    for t in range(1, MAX_CANDIDATES + 1):
        if tiles * tail <= FAILED_ROWS:
            return t
        probability *= mean / t
        tail -= probability
    return None


def _from_candidates(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    relu: bool,
    vals: Tensor,
    idx: Tensor,
    candidates: int,
    failed: Tensor,
) -> None:
    """Fills vals, idx and failed."""
    n_latents, k = w_enc.shape[0], vals.shape[1]
    c = triton.cdiv(n_latents, BLOCK_L) * candidates
    chunks = _chunks(len(x), 5 * c + _packed_bytes(k))
    size = chunks[0].stop
    keys = x.new_empty((size, c), dtype=torch.int32)
    cols = x.new_empty((size, c), dtype=torch.uint8)
    packed = x.new_empty((size, k), dtype=torch.int64)
    select = select_form(c, BLOCK_L)
    for rows in chunks:
        n = rows.stop - rows.start
        _encode(x[rows], w_enc, b_enc, keys, cols, candidates)
        select.launch((n,), keys, cols, packed, failed[rows], c, k, candidates)
        _order(packed[:n], relu, vals[rows], idx[rows])


def _from_all_keys(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, relu: bool, vals: Tensor, idx: Tensor
) -> None:
    """Fills vals and idx."""
    n_latents, k = w_enc.shape[0], vals.shape[1]
    chunks = _chunks(len(x), 4 * n_latents + _packed_bytes(k))
    size = chunks[0].stop
    keys = x.new_empty((size, n_latents), dtype=torch.int32)
    packed = x.new_empty((size, k), dtype=torch.int64)
    select = select_form(n_latents, None)
    for rows in chunks:
        n = rows.stop - rows.start
        _encode(x[rows], w_enc, b_enc, keys, None, 1)
        select.launch((n,), keys, None, packed, None, n_latents, k, 1)
        _order(packed[:n], relu, vals[rows], idx[rows])


def _encode(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, keys: Tensor, cols: Tensor | None, candidates: int
) -> None:
    """Keys of all pre-activations of x, or with cols of the candidates of every tile."""
    (n, d_model), n_latents = x.shape, w_enc.shape[0]
    form = encode_form(
        capability(x),
        x.element_size(),
        n,
        d_model,
        dense=cols is None,
        # Triton 3.9: the interpreter multiplies the bit patterns of bf16 operands.
        upcast=not x.is_cuda,
    )
    tiles = triton.cdiv(n, form.constants["BLOCK_N"]) * triton.cdiv(n_latents, BLOCK_L)
    form.launch((tiles,), x, w_enc, b_enc, keys, cols, n, n_latents, d_model, candidates)


def _order(packed: Tensor, relu: bool, vals: Tensor, idx: Tensor) -> None:
    """Sorts and unpacks the selected entries of some rows."""
    n, k = packed.shape
    if k > MAX_RANKED:
        packed = packed.sort(dim=1, descending=True).values
    form = order_form(k)
    blocks = triton.cdiv(k, form.constants["BLOCK_K"])
    form.launch((n, blocks), packed, vals, idx, k, int(relu))


def _packed_bytes(k: int) -> int:
    """A row's packed entries; torch.sort returns a copy and its indices and works in a third."""
    return 8 * k * (1 if k <= MAX_RANKED else 4)


def _chunks(n: int, row_bytes: int) -> list[slice]:
    """Slices of n >= 1 rows that fill TILE_BYTES at most (but have a row), the first the largest.

    Of nearly equal sizes: a last one of few rows would keep few SMs busy.
    """
    most = max(1, TILE_BYTES // row_bytes)
    size = triton.cdiv(n, triton.cdiv(n, most))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
