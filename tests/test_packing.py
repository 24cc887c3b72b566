"""Batches: each sequence once, within the budget, and a score that does not see its neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm import InputError
from sarm.packing import check_ids, iter_last_states, last_state, pad_right, plan_batches


@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 8000))
def test_plan(lengths, max_tokens):
    batches = plan_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= max_tokens or len(batch) == 1
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_plan_fills_its_batches():
    assert plan_batches([3] * 8, 12) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plan_batches([2, 9, 1], 4) == [[1], [0, 2]]


def alone(backbone, row):
    with torch.no_grad():
        return backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1]


rows_of_ids = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=24), max_size=9)


@settings(deadline=None, max_examples=25)
@given(rows=rows_of_ids, max_tokens=st.integers(1, 100))
def test_states_in_batches_equal_states_alone(rows, max_tokens, tiny_backbone):
    seen = {}
    for indices, states in iter_last_states(tiny_backbone, rows, max_tokens):
        assert states.shape == (len(indices), 32)
        assert states.dtype == torch.float32
        for i, state in zip(indices, states, strict=True):
            assert i not in seen
            seen[i] = state
    assert sorted(seen) == list(range(len(rows)))
    for i, row in enumerate(rows):
        torch.testing.assert_close(seen[i], alone(tiny_backbone, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_sliding_windows_in_batches(kind, make_sarm):
    backbone = make_sarm(kind=kind).model
    rows = [list(range(5, 35)), [7, 8, 9], list(range(40, 60))]
    for indices, states in iter_last_states(backbone, rows):
        for i, state in zip(indices, states, strict=True):
            torch.testing.assert_close(state, alone(backbone, rows[i]), atol=1e-5, rtol=1e-5)


def test_duplicates_run_once(tiny_backbone, forward_tokens):
    seen = forward_tokens(tiny_backbone)
    rows = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [1, 2, 3], [4, 5, 6]]
    got = dict(
        pair
        for indices, states in iter_last_states(tiny_backbone, rows)
        for pair in zip(indices, states, strict=True)
    )
    assert sum(seen) == 6
    assert torch.equal(got[0], got[3])
    assert torch.equal(got[1], got[4])
    assert not torch.equal(got[0], got[1])


def test_no_rows_no_forward(tiny_backbone, forward_tokens):
    seen = forward_tokens(tiny_backbone)
    assert list(iter_last_states(tiny_backbone, [])) == []
    assert last_state(tiny_backbone, torch.empty(0, 3).long(), torch.empty(0).long()).shape[0] == 0
    assert seen == []


def test_pad_right():
    ids, lengths = pad_right([[5], [6, 7, 8], [9, 9]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8], [9, 9, 0]]
    assert lengths.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("row", "text"),
    [([], "sequence 1: no tokens"),
     ([3, 300], r"sequence 1: token id 300 is not in \[0, 300\)"),
     ([-1], r"sequence 1: token id -1 is not in \[0, 300\)"),
     ([1.5], "sequence 1: token ids must be integers"),
     ([1.0], "sequence 1: token ids must be integers"),
     (["a"], "sequence 1: token ids must be integers"),
     ([None], "sequence 1: token ids must be integers"),
     ([[1, 2]], "sequence 1: token ids must be integers"),
     ([2**70], "sequence 1: token ids must be integers")],
)  # fmt: skip
def test_bad_ids(row, text, tiny_backbone, forward_tokens):
    seen = forward_tokens(tiny_backbone)
    with pytest.raises(InputError, match=text):
        list(iter_last_states(tiny_backbone, [[1], row]))
    assert seen == []  # found before any work is done


def test_good_ids():
    check_ids([[0, 299], (5,), range(3)], 300)
