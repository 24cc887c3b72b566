"""The selection's contract: order, ties, NaN, infinities, ReLU, tiles."""

import math

import pytest
import torch

from sarm import ops
from sarm.ops import reference

INF, NAN = math.inf, math.nan


def select(rows, k, **options):
    """topk_encode of given pre-activations: one row as the bias, several through one-hot x.

    Only the bias carries NaN, infinities and -0 unchanged: 0 * inf is NaN, and -0 + 0 is 0.
    """
    rows = torch.as_tensor(rows, dtype=torch.float32)
    n, n_latents = rows.shape
    if n == 1:
        return ops.topk_encode(torch.zeros(1, 0), torch.zeros(n_latents, 0), rows[0], k, **options)
    return ops.topk_encode(
        torch.eye(n), rows.t().contiguous(), torch.zeros(n_latents), k, **options
    )


def by_definition(row, k):
    """(vals, idx) by sorting: NaN first, then descending, ties by index."""

    def rank(i):
        return (0, 0.0, i) if math.isnan(row[i]) else (1, -row[i], i)

    order = sorted(range(len(row)), key=rank)[:k]
    return [row[i] for i in order], order


ROWS = {
    "all equal": [1.0] * 40,
    "all zero": [0.0] * 40,
    "signed zeros": [0.0, -0.0] * 20,
    "tie at the border": [3.0, 1.0, 2.0, 1.0, 1.0, 2.0, 0.0],
    "tie inside": [5.0, 7.0, 5.0, 7.0, 1.0, 0.5, 0.25],
    "all negative": [-float(i) for i in range(1, 41)],
    "one peak": [0.0] * 20 + [9.0] + [0.0] * 19,
    "ascending": [float(i) for i in range(2000)],
    "descending": [-float(i) for i in range(2000)],
    "steps": [float(i // 50) for i in range(3000)],
    "periodic": [float(i % 7) for i in range(3000)],
    "peaks at a distance of 64": [float(i % 64 == 0) * i for i in range(3000)],
    "-inf": [-INF] * 30 + [1.0, -INF, 2.0],
    "mostly -inf": [-INF] * 3000 + [1.0, -INF, 2.0],
    "+inf": [1.0, INF, 2.0, INF, -INF, 0.0],
    "NaN": [1.0, NAN, 2.0, NAN, INF, 0.0, -NAN],
    "all NaN": [NAN] * 40,
    "late NaN": [float(i % 11) for i in range(2000)] + [NAN, 3.0, NAN],
    "many NaN": [NAN if i % 3 else float(i) for i in range(3000)],
}


@pytest.mark.parametrize("k", [1, 2, 5, 64, 2500, None])
@pytest.mark.parametrize("name", ROWS)
def test_selection(backend, name, k):
    row = ROWS[name]
    k = len(row) if k is None else min(k, len(row))
    vals, idx = select([row], k)
    expected_vals, expected_idx = by_definition(row, k)
    assert idx[0].tolist() == expected_idx
    assert torch.equal(
        vals[0].nan_to_num(nan=12345.0), torch.tensor(expected_vals).nan_to_num(nan=12345.0)
    )


@pytest.mark.parametrize("k", [1, 3, 64, 200])
@pytest.mark.parametrize("levels", [1, 2, 10, 1000])
def test_quantised_rows_match_a_stable_sort(backend, levels, k):
    rows = torch.randint(-levels, levels, (30, 2111)).float() / 8
    vals, idx = select(rows, k)
    expected = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal(vals, expected.values[:, :k])
    assert torch.equal(idx, expected.indices[:, :k])


def test_relu_clamps_after_the_selection(backend):
    vals, idx = select([[-3.0, 2.0, -1.0]], 3, relu=True)
    assert vals.tolist() == [[2.0, 0.0, 0.0]]
    assert idx.tolist() == [[1, 2, 0]]


def test_selection_is_signed(backend):
    vals, idx = select([[-3.0, -2.0, -1.0]], 2)
    assert vals.tolist() == [[-1.0, -2.0]]
    assert idx.tolist() == [[2, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_do_not_change_the_result(backend, monkeypatch, dtype):
    # Small integers: every sum is exact in fp32, so tiles may not change a bit.
    x = torch.randint(-4, 5, (37, 24)).to(dtype)
    w_enc = torch.randint(-4, 5, (301, 24)).to(dtype)
    b_enc = torch.randint(-4, 5, (301,)).float()
    whole = ops.topk_encode(x, w_enc, b_enc, 9)
    monkeypatch.setattr(reference, "TILE_BYTES", 5000)
    tiled = ops.topk_encode(x, w_enc, b_enc, 9)
    assert torch.equal(whole.vals, tiled.vals)
    assert torch.equal(whole.idx, tiled.idx)


def test_no_tile_exceeds_the_limit(monkeypatch):
    limit = 4096
    monkeypatch.setattr(reference, "TILE_BYTES", limit)
    x, w_enc, b_enc = torch.randn(50, 8), torch.randn(100, 8), torch.zeros(100)
    seen = []
    for rows, pre in reference.preactivations(x, w_enc, b_enc):
        assert pre.untyped_storage().nbytes() <= limit
        seen += range(rows.start, rows.stop)
    assert seen == list(range(50))


def test_bf16_values_are_not_rounded_to_bf16(backend):
    x, w_enc = torch.randn(20, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    vals, idx = ops.topk_encode(x, w_enc, torch.zeros(300), 10)
    exact = (x.double() @ w_enc.double().t()).gather(1, idx)
    assert (vals - exact).abs().max() < 1e-4  # a bf16 rounding here is about 0.1
    assert (vals.bfloat16().float() != vals).any()
