"""Benchmarks with made-up latents: what a feature does is planted, nothing passes a backbone."""

import numpy as np
import torch

from sarm.evaluation import rules
from sarm.evaluation.metrics import Benchmark, Item, Measure
from sarm.evaluation.profiles import LatentSet
from sarm.ops import SparseLatents


def latent_set(dense, n_chosen=1, per_item=2, name="made", per_prompt=1, judge=None, measures=None):
    """Items of `per_item` consecutive rows of activations (N, F); the first are chosen.

    per_prompt: items that share a prompt.
    """
    dense = np.asarray(dense, np.float32)
    k = max(1, int((dense != 0).sum(1).max()))
    idx = np.argsort(dense == 0, axis=1, kind="stable")[:, :k]
    vals = np.take_along_axis(dense, idx, axis=1)
    items = []
    for i in range(len(dense) // per_item):
        group = f"{name} {i // per_prompt}"
        talk = [{"role": "user", "content": group}, {"role": "assistant", "content": "a"}]
        items.append(Item([talk] * per_item, n_chosen, f"{name}[{i}]", group))
    judge = judge or rules.each(rules.pair)
    measures = measures or (Measure("accuracy", {"accuracy": 1.0}),)
    latents = SparseLatents(torch.from_numpy(vals), torch.from_numpy(idx))
    return LatentSet(Benchmark(name, items, judge, measures, name), latents, dense.shape[1])


def sparse_rows(draw, rows, width, share=0.2):
    """(rows, width) activations, each above zero with probability `share`."""
    return draw.gamma(4.0, 0.25, (rows, width)) * (draw.random((rows, width)) < share)
