"""Triton kernel of sparse_value:  out[n, p] = sum_j vals[n, j] * w_head[p, idx[n, j]].

Nothing of size N x L is built. One program owns BLOCK_N tokens and walks over the P heads; the
tokens' vals and idx come from memory once and from L1 for the other heads. The cost is the gather:
each of the N * K * P weights is 4 bytes out of a 32-byte sector, unless w_head (P * L * 4 bytes,
256 KiB for one head of 65,536 latents) sits in L2, which it does at every published size.

    N  tokens      K  active latents      L  latents (n_latents)      P  heads or profiles
    vals_ptr, idx_ptr (N, K)      w_ptr (P, L)      out_ptr (N, P)      all row-major
    BLOCK_N, BLOCK_K: tile of tokens x active latents held in registers, powers of two
"""

import triton
import triton.language as tl
from torch import Tensor

from sarm.kernels.form import Build, Builds, Form

TILE = 1024  # BLOCK_N * BLOCK_K: eight values a thread with NUM_WARPS = 4
MAX_BLOCK_K = 256
NUM_WARPS = 4


@triton.jit
def sparse_value_kernel(
    vals_ptr,
    idx_ptr,
    w_ptr,
    out_ptr,
    N,
    K,
    L,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N tokens, all P heads."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    j = tl.arange(0, BLOCK_K)
    w_row = w_ptr
    for p in range(P):
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            mask = n_mask[:, None] & (first + j < K)[None, :]
            offset = n[:, None] * K + (first + j)[None, :]
            idx = tl.load(idx_ptr + offset, mask=mask, other=0)
            vals = tl.load(vals_ptr + offset, mask=mask, other=0.0)
            w = tl.load(w_row + idx, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(vals * w, axis=1)
        tl.store(out_ptr + n * P + p, total, mask=n_mask)
        w_row += L


def sparse_value_form(k: int) -> Form:
    """For k active latents."""
    block_k = min(MAX_BLOCK_K, triton.next_power_of_2(max(k, 1)))
    constants = {"BLOCK_N": TILE // block_k, "BLOCK_K": block_k}
    # Gathers wait for the L2: 16 warps, each with 8 gathers a thread on their way.
    return Form(sparse_value_kernel, constants, NUM_WARPS, warps_per_sm=16)


def sparse_value(vals: Tensor, idx: Tensor, w_head: Tensor) -> Tensor:
    """Launch on contiguous vals (N, k) fp32, idx (N, k) int64, w_head (P, n_latents).

    Indices are not checked: the caller guarantees 0 <= idx < n_latents.
    """
    (n, k), (p, n_latents) = vals.shape, w_head.shape
    out = vals.new_empty((n, p))
    if out.numel():
        form = sparse_value_form(k)
        grid = (triton.cdiv(n, form.constants["BLOCK_N"]),)
        form.launch(grid, vals, idx, w_head, out, n, k, n_latents, p)
    return out


def builds(capability: int) -> Builds:
    """The published k and the smallest, with 16-bit and fp32 heads."""
    for dtype in ("bf16", "fp32"):
        types = {"vals_ptr": "*fp32", "idx_ptr": "*i64", "w_ptr": f"*{dtype}", "out_ptr": "*fp32"}
        types |= dict.fromkeys("NKLP", "i32")
        for k in (1, 64, 192):
            form = sparse_value_form(k)
            yield Build(f"sparse_value {form.constants['BLOCK_K']}", form, types)
