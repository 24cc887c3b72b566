"""Rows of pre-activations, easy and hard for candidates, and whether topk_encode selects right."""

import math

import torch

from sarm import ops
from sarm.kernels.encode_tiles import BLOCK_L

L = 5 * BLOCK_L + 37
K = 6


def scattered(n):
    """Rows whose largest entries fall anywhere."""
    return torch.randn(n, L)


def concentrated(n):
    """The K largest of a row are neighbours: one tile holds more than T of them."""
    rows = torch.randn(n, L)
    for i, row in enumerate(rows):
        row[(first := 100 * i % (L - K)) : first + K] += 50
    return rows


def one_level(n):
    return torch.zeros(n, L)


def all_nan(n):
    return torch.full((n, L), math.nan)


def last_tile(n):
    """All results in the ragged tile."""
    rows = torch.randn(n, L)
    rows[:, -37:] += 50
    return rows


def encode(rows, k=K, dtype=torch.float32):
    """The encoder whose pre-activations are `rows`, up to the dtype's rounding: one-hot x."""
    n = len(rows)
    w_enc = rows.t().contiguous().to(dtype)
    if rows.isnan().any():  # 0 * NaN would spread
        return ops.topk_encode(torch.zeros(n, 0), torch.zeros(rows.shape[1], 0), rows[0], k)
    return ops.topk_encode(torch.eye(n, dtype=dtype), w_enc, torch.zeros(rows.shape[1]), k)


def agrees(rows, k=K, dtype=torch.float32):
    """Whether the result is a stable sort's."""
    vals, idx = encode(rows, k, dtype)
    rows = rows.to(dtype).float()
    expected = rows.sort(dim=1, descending=True, stable=True)
    same_vals = torch.equal(vals.nan_to_num(1e9), expected.values[:, :k].nan_to_num(1e9))
    return same_vals and torch.equal(idx, expected.indices[:, :k])
