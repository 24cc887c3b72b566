"""topk_encode's two routes: certified candidates of every tile, and all keys where they fail."""

import pytest
import torch
from encoded_rows import (
    K,
    L,
    agrees,
    all_nan,
    concentrated,
    encode,
    last_tile,
    one_level,
    scattered,
)

from sarm import ops
from sarm.kernels import select_keys, topk_encode
from sarm.kernels.encode_tiles import BLOCK_L


@pytest.fixture(autouse=True)
def _triton():
    with ops.use_backend("triton"):
        yield


@pytest.fixture
def repeated(monkeypatch):
    """Row counts that went to the second route."""
    seen = []
    real = topk_encode.rows_to_repeat

    def watch(failed):
        rows = real(failed)
        seen.append(len(rows))
        return rows

    monkeypatch.setattr(topk_encode, "rows_to_repeat", watch)
    return seen


@pytest.fixture
def fix_candidates(monkeypatch):
    """fix_candidates(T): T candidates of every tile, whatever the shape; None: all keys."""

    def fix(candidates):
        monkeypatch.setattr(topk_encode, "candidates_per_tile", lambda *shape: candidates)

    return fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [scattered, concentrated, one_level, all_nan, last_tile])
def test_parity(repeated, fix_candidates, make, dtype):
    fix_candidates(5)
    assert agrees(make(9), dtype=dtype)
    assert repeated == [0 if make is scattered else 9]


def test_only_failing_rows_are_repeated(repeated, fix_candidates):
    fix_candidates(K)
    rows = scattered(40)
    rows[17, 200:209] += 50
    rows[33] = 0
    assert agrees(rows)
    assert repeated == [2]


@pytest.mark.parametrize("candidates", [1, 2, 16])
@pytest.mark.parametrize("k", [1, 2, 30, 127, 500, L])
def test_any_k_with_any_number_of_candidates(fix_candidates, k, candidates):
    fix_candidates(candidates)
    assert agrees(torch.randint(-3, 4, (3, L)).float(), k)
    assert agrees(scattered(2), k)


@pytest.mark.parametrize("n_latents", [1, 3, 127, 128, 129, 256])
def test_few_latents(fix_candidates, n_latents):
    rows = scattered(3)[:, :n_latents]
    for candidates in (2, None):
        fix_candidates(candidates)
        for k in {1, min(3, n_latents), n_latents}:
            assert agrees(rows, k)


def test_streamed_selection(monkeypatch):
    """Rows longer than the registers hold, and more results than order_kernel ranks."""
    monkeypatch.setattr(select_keys, "BLOCKS_C", {8: 1})
    monkeypatch.setattr(select_keys, "STREAMED_C", 256)
    monkeypatch.setattr(topk_encode, "MAX_RANKED", 20)
    monkeypatch.setattr(select_keys, "MAX_RANKED", 20)
    for rows in (scattered(3), concentrated(3), one_level(2)):
        assert agrees(rows, 40)


@pytest.mark.parametrize("make", [scattered, concentrated])
def test_chunks_stay_below_the_limit_and_change_nothing(monkeypatch, make):
    rows = make(23)
    whole = encode(rows)
    limit = 5 * 4 * (L + 8 * K)  # five rows of all keys, more of candidates
    monkeypatch.setattr(topk_encode, "TILE_BYTES", limit)
    allocated = []
    monkeypatch.setattr(torch.Tensor, "new_empty", watch_allocations(allocated))
    tiled = encode(rows)
    assert torch.equal(whole.vals, tiled.vals)
    assert torch.equal(whole.idx, tiled.idx)
    buffers = [b for b in allocated if b.dtype != torch.float32 and b.shape[-1:] != (K,)]
    assert max(b.nbytes for b in buffers) <= limit


def watch_allocations(allocated):
    real = torch.Tensor.new_empty

    def new_empty(self, *arguments, **options):
        allocated.append(real(self, *arguments, **options))
        return allocated[-1]

    return new_empty


@pytest.mark.parametrize(
    ("n_latents", "k", "expected"),
    [
        (65536, 192, 6),
        (18432, 64, 6),
        (262144, 192, 5),
        (65536, 1, 2),
        (65536, 2048, 17),
        (2304, 192, None),
        (512, 512, None),
        (1, 1, None),
    ],
)
def test_number_of_candidates(n_latents, k, expected):
    assert topk_encode.candidates_per_tile(n_latents, k) == expected


@pytest.mark.parametrize(("n_latents", "k"), [(65536, 192), (18432, 64), (65536, 2048)])
def test_few_rows_fail_when_latents_fall_anywhere(n_latents, k):
    candidates = topk_encode.candidates_per_tile(n_latents, k)
    trials = 2000
    failed = 0
    for _ in range(trials // 100):
        active = torch.rand(100, n_latents).topk(k, dim=1).indices // BLOCK_L
        count = torch.zeros(100, n_latents // BLOCK_L).scatter_add_(
            1, active, torch.ones(active.shape)
        )
        failed += int((count.amax(1) >= candidates).sum())
    assert failed <= 12  # 4 expected at most
