"""Suite `ops`: SAE encode and reward of N states, against the published dense formula.

Floor: the encoder GEMM alone. Baseline: the published formula in eager PyTorch, which writes the
(N, n_latents) pre-activations, selects, scatters into a dense tensor and multiplies by the head.
"""

from __future__ import annotations

import torch
from measure import measure, rows
from torch.nn.functional import linear

from sarm import ops

SHAPES = ((2048, 576, 9216, 27), (4096, 576, 18432, 64), (64, 4096, 65536, 192))


def run(device: str, shapes=SHAPES, runs: int = 7) -> list[dict]:
    """One row per shape and candidate."""
    table = []
    for n, d_model, n_latents, k in shapes:
        timings = measure(candidates(device, n, d_model, n_latents, k), runs)
        shape = {"N": n, "d_model": d_model, "n_latents": n_latents, "k": k}
        table += [{**shape, **row} for row in rows(timings, "GEMM alone", "published dense")]
    return table


def candidates(device: str, n: int, d_model: int, n_latents: int, k: int) -> dict:
    """The four things that are timed on one shape, fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_model, generator=generator).to(device)
    w_enc = (torch.randn(n_latents, d_model, generator=generator) / d_model**0.5).to(device)
    b_enc = torch.zeros(n_latents, device=device)
    head = torch.randn(1, n_latents, generator=generator).to(device)

    def published() -> torch.Tensor:
        pre = linear(x, w_enc, b_enc)
        vals, idx = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter_(1, idx, vals) @ head.t()

    def ours() -> torch.Tensor:
        vals, idx = ops.topk_encode(x, w_enc, b_enc, k)
        return ops.sparse_value(vals, idx, head)

    def reference() -> torch.Tensor:
        with ops.use_backend("reference"):
            return ours()

    return {
        "GEMM alone": lambda: linear(x, w_enc, b_enc),
        "published dense": published,
        "sarm, reference": reference,
        "sarm": ours,
    }
