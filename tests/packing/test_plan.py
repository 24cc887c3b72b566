"""Passes: bounded, complete, in an order that has every ancestor ready."""

from hypothesis import given
from hypothesis import strategies as st

from sarm.packing.plan import plan_passes
from sarm.packing.tree import prefix_tree

rows_of_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


def path_of(piece):
    """All pieces from the root to this one."""
    return [*path_of(piece.parent), piece] if piece else []


@given(rows_of_ids, st.integers(1, 30))
def test_every_token_once_within_the_budget(rows, max_tokens):
    nodes = prefix_tree(rows)
    passes = plan_passes(nodes, max_tokens)
    assert [batch.number for batch in passes] == list(range(len(passes)))
    done, last_use = {}, {}
    for batch in passes:
        assert 0 < batch.tokens <= max_tokens
        assert batch.tokens == sum(len(piece.tokens) for piece in batch.pieces)
        for piece in batch.pieces:
            before = path_of(piece)[:-1]
            assert all(p in done for p in before)
            assert sum(len(p.tokens) for p in before) == piece.start
            done[piece] = [t for p in path_of(piece) for t in p.tokens]
            last_use.update(dict.fromkeys(path_of(piece), batch.number))
    for piece, ids in done.items():
        assert piece.last_use == last_use[piece]
        for row in piece.rows:
            assert ids == rows[row]
    assert sorted(i for piece in done for i in piece.rows) == list(range(len(rows)))
    assert sum(len(piece.tokens) for piece in done) == sum(map(len, nodes))


@given(rows_of_ids, st.integers(1, 30))
def test_what_is_kept_lies_on_one_path(rows, max_tokens):
    passes = plan_passes(prefix_tree(rows), max_tokens)
    for batch in passes:
        kept = [
            p for b in passes[: batch.number + 1] for p in b.pieces if p.last_use > batch.number
        ]
        longest = max(kept, key=lambda p: p.start, default=None)
        assert set(kept) <= set(path_of(longest) if longest else [])


def test_longest_first_and_subtrees_together():
    rows = [[1, 1], [2] * 9, [3, 3, 3, 1], [3, 3, 3, 2], [4] * 5]
    passes = plan_passes(prefix_tree(rows), 9)
    assert [[p.rows for p in batch.pieces] for batch in passes] == [
        [(1,)],
        [(4,)],
        [(), (2,), (3,), (0,)],
    ]


def test_a_subtree_above_the_budget_shares_its_run():
    rows = [[1] * 10 + [i] * 4 for i in range(2, 6)]
    passes = plan_passes(prefix_tree(rows), 10)
    assert [batch.tokens for batch in passes] == [10, 8, 8]
    passes = plan_passes(prefix_tree(rows), 7)
    assert [batch.tokens for batch in passes] == [7, 7, 4, 4, 4]
    assert len(passes[0].pieces) == 1
    assert passes[0].pieces[0].last_use == 4
