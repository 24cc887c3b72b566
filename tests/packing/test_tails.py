"""States of the last tokens: those of the transformers forward, however sequences are packed."""

import pytest
import torch

from sarm.packing import Budget, iter_tail_states
from sarm.packing.forward import PackedDecoder


def tails(backbone, rows, tail, max_tokens, budget=None):
    found = {}
    for done, states in iter_tail_states(backbone, rows, tail, max_tokens, budget=budget):
        for row, state in zip(done, states, strict=True):
            assert row not in found
            found[row] = state
    assert sorted(found) == list(range(len(rows)))
    return found


@pytest.fixture
def rows():
    """Shared prefixes longer and shorter than a tail, twins, a row that another begins with."""
    torch.manual_seed(3)
    prompt = torch.randint(5, 290, (20,)).tolist()
    shorter = [prompt + torch.randint(5, 290, (n,)).tolist() for n in (1, 3, 9, 30)]
    return [*shorter, shorter[2], shorter[3][:27], prompt, [7], torch.arange(5, 45).tolist()]


@pytest.mark.parametrize("tail", [1, 4, 16, 100])
@pytest.mark.parametrize("max_tokens", [4096, 24])
def test_states_of_the_plain_forward(tiny_backbone, rows, tail, max_tokens):
    found = tails(tiny_backbone, rows, tail, max_tokens)
    for i, row in enumerate(rows):
        with torch.inference_mode():
            whole = tiny_backbone(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(found[i], whole[-tail:], rtol=1e-4, atol=1e-4)


def test_padded_where_sequences_cannot_be_packed(tiny_backbone, rows, monkeypatch):
    expected = tails(tiny_backbone, rows, 6, 4096)
    monkeypatch.setattr("sarm.packing.tails.unpackable", lambda backbone: "a reason")
    found = tails(tiny_backbone, rows, 6, 64)
    for i in expected:
        torch.testing.assert_close(found[i], expected[i], rtol=1e-4, atol=1e-4)


def test_a_pass_that_does_not_fit_is_halved(tiny_backbone, rows, monkeypatch):
    """Halves cut pieces in two: the tail is put together from both."""
    expected = tails(tiny_backbone, rows, 16, 4096)
    run, failed = PackedDecoder.run, []

    def limited(self, batch, after=None):
        if batch.tokens > 11:
            failed.append(batch.tokens)
            raise torch.OutOfMemoryError("test")
        return run(self, batch, after)

    monkeypatch.setattr(PackedDecoder, "run", limited)
    found = tails(tiny_backbone, rows, 16, 4096, Budget())
    assert failed
    for i in expected:
        torch.testing.assert_close(found[i], expected[i], rtol=1e-4, atol=1e-4)
