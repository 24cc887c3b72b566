"""The parity tests can fail: one wrong character in a kernel, or a skipped check, turns them red.

A mutant is a copy of a kernel file with one replacement, whose kernel the launcher then runs. Only
mutants that stay inside their arrays: the interpreter does not check addresses.
"""

import importlib.util

import pytest
import torch
from encoded_rows import agrees, concentrated, one_level, scattered

from sarm import ops
from sarm.kernels import encode_tiles, gather_dot, gather_sum, scatter_outer, select_keys
from sarm.kernels import topk_encode as launcher


@pytest.fixture(autouse=True)
def _triton():
    with ops.use_backend("triton"):
        yield


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    """mutate(module, kernel, old, new): the launchers use the kernel of the changed file.

    A helper that another module imports is replaced there: `user`. What a mutant does not write is
    NaN: fresh memory may hold the result of the unchanged kernel.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)

    def change(module, kernel, old, new, user=None):
        with open(module.__file__, encoding="utf-8") as file:
            source = file.read()
        assert source.count(old) == 1, f"{old!r} must occur once"
        path = tmp_path / "mutant.py"
        path.write_text(source.replace(old, new), "utf-8")
        spec = importlib.util.spec_from_file_location("mutant", path)
        mutant = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mutant)
        monkeypatch.setattr(user or module, kernel, getattr(mutant, kernel))

    yield change
    torch.use_deterministic_algorithms(deterministic)


def topk_is_right():
    rows = torch.cat([scattered(4), concentrated(2), one_level(1)])
    levels = torch.randint(-3, 4, (3, 300)).float()
    every = scattered(2)[:, :129]  # all results, the last latent's too
    return agrees(rows) and agrees(levels, 40) and agrees(levels - 10, 7) and agrees(every, 129)


def test_the_unchanged_kernels_pass(mutate):
    mutate(select_keys, "select_kernel", "keys > threshold", "keys >  threshold")
    assert topk_is_right()


def test_dropped_overflow_check(monkeypatch):
    monkeypatch.setattr(launcher, "candidates_per_tile", lambda n_latents, k: 5)
    assert agrees(concentrated(3))
    monkeypatch.setattr(launcher, "rows_to_repeat", lambda failed: failed[:0].long())
    assert agrees(scattered(3))  # rows that need no repeat stay right
    assert not agrees(concentrated(3))
    assert not agrees(one_level(3))


SELECT = (select_keys, "select_kernel")
ENCODE = (encode_tiles, "encode_tiles_kernel")


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        (SELECT, "(equal_rank < K)", "(equal_rank < K - 1)"),
        (SELECT, "count_at_least(threshold + 1,", "count_at_least(threshold,"),
        (SELECT, "position % T == T - 1", "position % T == T"),
        (ENCODE, "first_l + col < L", "first_l + col < L - 1"),
        (ENCODE, "tl.minimum(col, L - 1 - first_l)", "tl.minimum(col, L - 2 - first_l)"),
        (ENCODE, "d < D - first_d", "d < D - first_d - 1"),
        (ENCODE, "col[None, :] == best_col[:, None], PAD", "key == best[:, None], PAD"),
    ],
)
def test_mutants_of_topk_encode(mutate, monkeypatch, kernel, old, new):
    monkeypatch.setattr(launcher, "candidates_per_tile", lambda n_latents, k: 5)
    mutate(*kernel, old, new)
    assert not topk_is_right()


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ((gather_sum, "gather_sum_kernel"), "(j < K)[:, None]", "(j < K - 1)[:, None]"),
        ((gather_dot, "gather_dot_kernel"), "(d < D)[None, :]", "(d < D - 1)[None, :]"),
        ((gather_dot, "gather_dot_kernel"), "tl.where(begin > 0, K, 0)", "0"),
        ((scatter_outer, "sum_segments_kernel"), "end - begin <= piece", "end - begin < piece"),
        ((scatter_outer, "sum_pieces_kernel"), "tl.minimum(first + piece, end)", "end"),
    ],
)
def test_mutants_of_the_gathers(mutate, monkeypatch, kernel, old, new):
    monkeypatch.setattr(scatter_outer, "PIECE", 4)
    monkeypatch.setattr(gather_dot, "L2_BYTES", 0)
    assert gathers_are_right()
    mutate(*kernel, old, new)
    assert not gathers_are_right()


def gathers_are_right():
    n, k, n_latents, d = 20, 5, 9, 600
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):  # every sum is exact in fp32
        return torch.randint(-4, 5, shape, generator=generator).float()

    vals, y, w = integers(n, k), integers(n, d), integers(n_latents, d)
    idx = torch.randint(n_latents, (n, k), generator=generator)
    idx[idx == 7] = 6
    idx[4, :4] = 7  # a segment of just one piece
    idx[:4] = 8  # 20 entries and more: five pieces
    act = torch.zeros(n, n_latents).scatter_add(1, idx, vals)
    return (
        torch.equal(ops.gather_sum(vals, idx, w), act @ w)
        and torch.equal(ops.gather_dot(y, idx, w), (y @ w.t()).gather(1, idx))
        and torch.equal(ops.scatter_outer(vals, idx, y, n_latents), act.t() @ y)
    )
