"""How far an encoder's values and indices are from the product in fp64."""

from __future__ import annotations

import torch
from cases import Problem
from torch import Tensor

ROWS = 64  # sampled evenly; the fp64 product of all rows would take longer than the benchmark
CHUNK = 4096  # latents converted to fp64 at a time


class Exact:
    """The fp64 pre-activations of a sample of the problem's rows."""

    def __init__(self, problem: Problem) -> None:
        n, _, n_latents, self.k = problem.shape
        self.rows = torch.linspace(0, n - 1, min(n, ROWS), device=problem.device).long()
        x = problem.x[self.rows].double()
        self.pre = torch.empty(len(self.rows), n_latents, dtype=torch.float64, device=x.device)
        for first in range(0, n_latents, CHUNK):
            part = slice(first, first + CHUNK)
            torch.mm(x, problem.w_enc[part].double().t(), out=self.pre[:, part])
            self.pre[:, part] += problem.b_enc[part].double()
        self.border = self.pre.topk(self.k, dim=1).values[:, -1:]

    def compare(self, vals: Tensor, idx: Tensor) -> dict[str, float]:
        """`error`: the largest error of a value, over the largest value; `agree`: the share of
        indices that belong to the exact top k (by value, so that ties do not count as wrong)."""
        exact = self.pre.gather(1, idx[self.rows])
        error = (vals[self.rows].double() - exact).abs().max() / exact.abs().max()
        return {"error": error.item(), "agree": (exact >= self.border).double().mean().item()}
