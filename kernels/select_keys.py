"""Triton kernels that find the k largest keys of a row, and put them in order.

select_kernel reads a row of keys and writes its K largest, packed with their indices, in any order.
No sort: the K-th largest key is found bit by bit, by counting the keys at or above a trial value,
and stops at the first value that exactly K keys reach. One more pass over the row collects them.
For a candidate row of 3072 keys (n_latents = 65536, T = 6) that is about 20 comparisons a key; a
bitonic sort of the row would take 78.

    all entries     TILED = False: the row is all pre-activations; the index is the position
    candidates      TILED = True: the T best of every tile of BLOCK_L latents. The result is certain
                    unless a tile's last candidate is selected: the tile may hold more. Such rows
                    are marked in failed_ptr (with the number of such tiles), and the caller
                    computes them again from all entries.

Positions ascend with the index among equal keys in both layouts, so ties go to the lowest index.

order_kernel puts the K packed entries of a row in their places and unpacks them.

    C  keys of a row      K  wanted      T  candidates of a tile
    keys_ptr (rows, C)      cols_ptr (rows, C)      packed_ptr (rows, K)      failed_ptr (rows,)
"""

import triton
import triton.language as tl

from sarm.kernels.form import Build, Builds, Form
from sarm.kernels.keys import PACKED_PAD, PAD, index_of_packed, key_of_packed, pack, value_of

# Rows of up to so many keys stay in registers (with how many warps); longer ones are read again,
# from L2, for every bit.
BLOCKS_C = {1024: 4, 4096: 4, 16384: 16}
STREAMED_C = 8192
STREAMED_WARPS = 16
BLOCK_S = 1024  # collecting takes ten registers a key, so it goes in shorter blocks, from L1
# An entry's place is the number of entries above it: K * K comparisons, fewer instructions than a
# bitonic sort up to K of about 300, and four times as many at 1024; beyond, torch.sort.
BLOCK_K = 128
BLOCK_O = 32
MAX_RANKED = 1024


@triton.jit
def count_at_least(key, held, keys_ptr, C, BLOCK_C: tl.constexpr, RESIDENT: tl.constexpr):
    """How many of the row's C keys are >= key."""
    if RESIDENT:
        return tl.sum((held >= key).to(tl.int32))
    at = tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_C,), dtype=tl.int32)
    for first in range(0, C, BLOCK_C):
        keys = tl.load(keys_ptr + first + at, mask=first + at < C, other=PAD)
        count += (keys >= key).to(tl.int32)
    return tl.sum(count)


@triton.jit(do_not_specialize=["K", "T"])
def select_kernel(
    keys_ptr,
    cols_ptr,
    packed_ptr,
    failed_ptr,
    C,
    K,
    T,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILED: tl.constexpr,
):
    """One program: one row, counted in blocks of BLOCK_C, collected in blocks of BLOCK_S.

    RESIDENT: C <= BLOCK_C.
    """
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * C
    packed_ptr += row * K
    held = PAD
    if RESIDENT:
        at = tl.arange(0, BLOCK_C)
        held = tl.load(keys_ptr + at, mask=at < C, other=PAD)

    # The largest threshold that K keys reach: first its sign, then one bit after the other.
    threshold = PAD
    reached = C
    count = count_at_least(0, held, keys_ptr, C, BLOCK_C, RESIDENT)
    if count >= K:
        threshold = 0
        reached = count
    bit = 30
    while (bit >= 0) & (reached != K):
        trial = threshold | (1 << bit)
        count = count_at_least(trial, held, keys_ptr, C, BLOCK_C, RESIDENT)
        if count >= K:
            threshold = trial
            reached = count
        bit -= 1

    # All keys above it, then those equal to it in the order of their indices until there are K.
    n_above = count_at_least(threshold + 1, held, keys_ptr, C, BLOCK_C, RESIDENT)
    above_before = 0
    equal_before = 0
    last_taken = 0
    for first in range(0, C, BLOCK_S):
        position = first + tl.arange(0, BLOCK_S)
        keys = tl.load(keys_ptr + position, mask=position < C, other=PAD)
        above = keys > threshold
        equal = (keys == threshold) & (position < C)
        above_rank = above_before + tl.cumsum(above.to(tl.int32)) - 1
        equal_rank = n_above + equal_before + tl.cumsum(equal.to(tl.int32)) - 1
        taken = above | (equal & (equal_rank < K))
        index = position
        if TILED:
            col = tl.load(cols_ptr + row * C + position, mask=taken, other=0)
            index = position // T * BLOCK_L + col.to(tl.int32)
            last_taken += tl.max((taken & (position % T == T - 1)).to(tl.int32))
        slot = tl.where(above, above_rank, equal_rank)
        tl.store(packed_ptr + slot, pack(keys, index), mask=taken)
        above_before += tl.sum(above.to(tl.int32))
        equal_before += tl.sum(equal.to(tl.int32))
    if TILED:
        tl.store(failed_ptr + row, last_taken)


@triton.jit(do_not_specialize=["K", "relu"])
def order_kernel(
    packed_ptr,
    vals_ptr,
    idx_ptr,
    K,
    relu,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SORTED: tl.constexpr,
):
    """One program: BLOCK_K entries of a row. Packed entries differ, so their ranks do too."""
    row = tl.program_id(0).to(tl.int64)
    packed_ptr += row * K
    at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    packed = tl.load(packed_ptr + at, mask=at < K, other=PACKED_PAD)
    rank = at
    if not SORTED:
        rank = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for first in range(0, K, BLOCK_O):
            other_at = first + tl.arange(0, BLOCK_O)
            others = tl.load(packed_ptr + other_at, mask=other_at < K, other=PACKED_PAD)
            rank += tl.sum((others[None, :] > packed[:, None]).to(tl.int32), axis=1)
    vals = value_of(key_of_packed(packed))
    vals = tl.where((vals < 0.0) & (relu != 0), 0.0, vals)  # keeps NaN
    tl.store(vals_ptr + row * K + rank, vals, mask=at < K)
    tl.store(idx_ptr + row * K + rank, index_of_packed(packed), mask=at < K)


def select_form(c: int, block_l: int | None) -> Form:
    """For rows of c keys: candidates of tiles of block_l latents, or all entries (None)."""
    block_c = next((size for size in BLOCKS_C if c <= size), STREAMED_C)
    constants = {
        "BLOCK_L": block_l or 0,
        "BLOCK_C": block_c,
        "BLOCK_S": BLOCK_S,
        "RESIDENT": c <= max(BLOCKS_C),
        "TILED": block_l is not None,
    }
    # A pass is a few instructions and a barrier: 16 warps an SM cover each other's.
    num_warps = BLOCKS_C.get(block_c, STREAMED_WARPS)
    return Form(select_kernel, constants, num_warps, warps_per_sm=16)


def order_form(k: int) -> Form:
    """For rows of k packed entries; above MAX_RANKED they are sorted already."""
    constants = {"BLOCK_K": BLOCK_K, "BLOCK_O": BLOCK_O, "SORTED": k > MAX_RANKED}
    return Form(order_kernel, constants, num_warps=4, warps_per_sm=16)


def builds(capability: int) -> Builds:
    """Every form; none depends on the architecture."""
    types = {"keys_ptr": "*i32", "cols_ptr": "*u8", "packed_ptr": "*i64", "failed_ptr": "*i32"}
    types |= dict.fromkeys("CKT", "i32")
    for tiled in (True, False):
        for c in (*BLOCKS_C, max(BLOCKS_C) + 1):
            form = select_form(c, 128 if tiled else None)
            kind = "" if form.constants["RESIDENT"] else " streamed"
            label = f"select {form.constants['BLOCK_C']}{kind} {'candidates' if tiled else 'keys'}"
            yield Build(label, form, types)
    types = {"packed_ptr": "*i64", "vals_ptr": "*fp32", "idx_ptr": "*i64", "K": "i32"}
    types |= {"relu": "i32"}
    yield Build("order by rank", order_form(MAX_RANKED), types)
    yield Build("order sorted", order_form(MAX_RANKED + 1), types)
