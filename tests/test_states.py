"""The state cache: a sequence passes a backbone once, whatever happens in between."""

import sqlite3

import pytest
import torch

import sarm
from sarm import InputError
from sarm.states import StateCache, fingerprint, token_key

ROWS = [[1, 2, 3], [4, 5], [1, 2, 3], [6], list(range(10, 30)), [4, 5]]


def expected(backbone):
    with torch.no_grad():
        return torch.stack(
            [backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        )


def test_states_and_resuming(tiny_backbone, forward_tokens, tmp_path):
    seen = forward_tokens(tiny_backbone)
    with StateCache(tmp_path / "deep" / "s.sqlite", tiny_backbone) as cache:
        progress = []
        first = cache.states(ROWS, progress=lambda *p: progress.append(p), max_tokens=20)
        assert len(cache) == 4
        assert progress[0] == (0, 26)
        assert progress[-1] == (26, 26)
        assert [p for p, _ in progress] == sorted(p for p, _ in progress)
    assert 26 <= sum(seen) <= 30  # 26 tokens in 4 different rows, and their padding
    seen.clear()
    torch.testing.assert_close(first, expected(tiny_backbone), atol=1e-5, rtol=1e-5)
    seen.clear()
    with StateCache(tmp_path / "deep" / "s.sqlite", tiny_backbone) as cache:
        progress = []
        again = cache.states(ROWS, progress=lambda *p: progress.append(p))
        assert cache.states([]).shape == (0, 32)
    assert seen == []
    assert progress == [(0, 0)]
    assert torch.equal(first, again)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_crash_between_batches_loses_nothing(after, tiny_backbone, forward_tokens, tmp_path):
    class Crash(Exception):
        pass

    calls = []

    def crash(done, total):
        calls.append(done)
        if len(calls) == after + 1:  # the first call reports the start
            raise Crash

    path = tmp_path / "s.sqlite"
    with pytest.raises(Crash), StateCache(path, tiny_backbone) as cache:
        cache.states(ROWS, max_tokens=1, progress=crash)  # one row a batch
    seen = forward_tokens(tiny_backbone)
    with StateCache(path, tiny_backbone) as cache:
        assert len(cache) == after
        states = cache.states(ROWS, max_tokens=1)
    assert sum(seen) == 26 - calls[-1]
    seen.clear()
    torch.testing.assert_close(states, expected(tiny_backbone), atol=1e-5, rtol=1e-5)


def test_an_unfinished_transaction_is_not_seen(tiny_backbone, tmp_path):
    # what kill -9 in the middle of a batch leaves: a connection that never committed
    path = tmp_path / "s.sqlite"
    cache = StateCache(path, tiny_backbone)
    cache.states(ROWS[:1])
    cache._db.execute("INSERT INTO states VALUES (?, ?)", (token_key([9]), b"half"))
    cache._db.close()
    with StateCache(path, tiny_backbone) as again:
        assert len(again) == 1


def test_another_backbone_is_refused(tiny_backbone, backbone_dir, tmp_path):
    with StateCache(tmp_path / "s", tiny_backbone) as cache:
        cache.states(ROWS)
    other = sarm.load_backbone(backbone_dir(), 2, dtype=torch.float32, device="cpu")
    half = sarm.load_backbone(backbone_dir(), 3, dtype=torch.bfloat16, device="cpu")
    for backbone in (other, half):
        with pytest.raises(InputError, match="holds states of another backbone"):
            StateCache(tmp_path / "s", backbone)
    with StateCache(tmp_path / "s", tiny_backbone) as cache:
        assert len(cache) == 4


@pytest.mark.parametrize("content", [b"this is not a database, it is a text" * 50, b"x" * 4096])
def test_a_file_that_is_no_database(content, tiny_backbone, tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"s\.sqlite: not a state cache"):
        StateCache(path, tiny_backbone)
    assert path.read_bytes() == content


def test_a_directory(tiny_backbone, tmp_path):
    with pytest.raises(InputError, match="cannot be used now"):
        StateCache(tmp_path, tiny_backbone)


def test_a_damaged_state(tiny_backbone, tmp_path):
    with StateCache(tmp_path / "s", tiny_backbone) as cache:
        cache.states(ROWS)
        cache._db.execute("UPDATE states SET state = x'00000000'")
        cache._db.commit()
        with pytest.raises(InputError, match="damaged, a state of 4 bytes"):
            cache.states(ROWS)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tiny_backbone, tmp_path):
    path = tmp_path / "s.sqlite"
    with StateCache(path, tiny_backbone) as cache:
        cache.states(ROWS[:1])
        (pages,) = cache._db.execute("PRAGMA page_count").fetchone()
        cache._db.execute(f"PRAGMA max_page_count = {pages}")
        many = [[i % 300, i // 300, 5] for i in range(600)]
        with pytest.raises(InputError, match=r"cannot be used now .*full"):
            cache.states(many, max_tokens=30)
    with StateCache(path, tiny_backbone) as cache:
        assert cache.states(ROWS).shape == (6, 32)


def test_keys_tell_sequences_apart():
    rows = [[1, 2], [2, 1], [1], [1, 2, 0], [258], [1, 1]]
    assert len({token_key(row) for row in rows}) == len(rows)
    assert token_key([1, 2]) == token_key((1, 2))


def test_fingerprint_sees_one_steered_feature(make_sarm):
    model = make_sarm(n_latents=20000, d_model=32)
    before = fingerprint(model)
    assert before == fingerprint(model)
    for feature in (1, 4097, 19999):
        with torch.no_grad():
            model.score.weight[0, feature] *= 2
        after = fingerprint(model)
        assert after != before
        before = after


def test_fingerprint_names_every_part(make_sae):
    base = fingerprint(make_sae())
    for other in (make_sae(seed=3), make_sae(n_latents=97), make_sae(dtype=torch.bfloat16)):
        assert fingerprint(other) != base


def test_rows_are_durable_before_progress_is_told(tiny_backbone, tmp_path):
    path = tmp_path / "s.sqlite"
    counts = []

    def look(done, total):
        with sqlite3.connect(path) as other:
            counts.append(other.execute("SELECT count(*) FROM states").fetchone()[0])

    with StateCache(path, tiny_backbone) as cache:
        cache.states(ROWS, max_tokens=1, progress=look)
    assert counts == [0, 1, 2, 3, 4]
