"""The prefix tree against its definition: every distinct prefix of a row is one token of it."""

from hypothesis import given
from hypothesis import strategies as st

from sarm.packing.tree import forks_of, prefix_tree

# few distinct ids, so that rows share prefixes, repeat and begin one another
rows_of_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


def spelled(nodes, i):
    """The tokens from the root to the end of node i."""
    node = nodes[i]
    before = spelled(nodes, node.parent) if node.parent >= 0 else []
    assert len(before) == node.start
    return before + list(node.source[node.start : node.end])


@given(rows_of_ids)
def test_every_row_is_the_path_to_its_node_and_every_prefix_is_there_once(rows):
    nodes = prefix_tree(rows)
    assert sorted(i for node in nodes for i in node.rows) == list(range(len(rows)))
    for i, node in enumerate(nodes):
        assert node.end > node.start
        for row in node.rows:
            assert spelled(nodes, i) == rows[row]
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    assert sum(map(len, nodes)) == len(prefixes)


@given(rows_of_ids)
def test_nodes_end_only_where_rows_end_or_part(rows):
    nodes = prefix_tree(rows)
    children = [node.parent for node in nodes]
    for i, node in enumerate(nodes):
        assert node.rows or children.count(i) > 1


@given(rows_of_ids)
def test_depth_first_order(rows):
    nodes = prefix_tree(rows)
    path = []
    for i, node in enumerate(nodes):
        while path and path[-1] != node.parent:
            path.pop()
        assert node.parent == (path[-1] if path else -1)  # else its subtree were not contiguous
        path.append(i)


def test_a_row_that_begins_another_ends_inside():
    nodes = prefix_tree([[5, 6, 7], [5, 6], [5, 6, 8], [5, 6]])
    assert [(n.parent, n.start, n.end, n.rows) for n in nodes] == [
        (-1, 0, 2, (1, 3)),
        (0, 2, 3, (0,)),
        (0, 2, 3, (2,)),
    ]


def test_forks():
    # rows abcde, abcdx, aby, az: b's row is left at 4, 2 and 1
    assert forks_of([0, 4, 2, 1]) == [[1, 2, 4], [], [], []]


def test_large_ids_and_long_chains():
    top = 2**32 - 1
    nodes = prefix_tree([[top, 1], [1, top], [256], [1]])
    assert sorted(tuple(spelled(nodes, i)) for i in range(len(nodes)) if nodes[i].rows) == [
        (1,), (1, top), (256,), (top, 1),
    ]  # fmt: skip
    chain = [[7] * n for n in range(1, 3000)]
    assert len(prefix_tree(chain)) == 2999  # no recursion
