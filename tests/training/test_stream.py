"""Chunks of states: the same however often the run was interrupted, every state exactly once."""

import pytest
import tiny_sarm
import torch

from sarm.sae import normalize_tokens
from sarm.training import stream
from sarm.training.activations import WindowMaker, window_states
from sarm.training.stream import StateStream, survey

TEXTS = tiny_sarm.make_texts(40)


class Killed(Exception):
    pass


def kill_after(calls):
    """A progress callback that raises when called for the `calls`-th time."""
    left = [calls]

    def progress(states):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return progress


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 8)


@pytest.fixture
def make(backbone, tokenizer, tmp_path):
    def stream_of(kind="sentence", chunk_states=30, folder="states", **options):
        maker = WindowMaker(tokenizer, kind, context=64)
        return StateStream(backbone, maker, tmp_path / folder, chunk_states, **options)

    return stream_of


def all_states(stream, texts):
    """Every state of the corpus, one window at a time, without the stream."""
    states = [
        window_states(stream.backbone, window, stream.maker.kind, stream.maker.end_id)
        for windows in stream.maker.windows(texts)
        for window in windows
    ]
    return normalize_tokens(torch.cat(states))


def collect(stream, texts, **options):
    return [(c.states.clone(), c.documents, c.tokens) for c in stream.chunks(texts, **options)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", ["token", "sentence", "turn-end"])
@pytest.mark.parametrize("as_iterator", [False, True], ids=["list", "generator"])
def test_chunks_hold_every_state_of_the_corpus_once_in_order(make, kind, as_iterator):
    made = make(kind)
    expected = all_states(made, TEXTS)
    chunks = collect(made, iter(TEXTS) if as_iterator else TEXTS)
    assert len(chunks) > 1
    assert torch.equal(torch.cat([c[0] for c in chunks]), expected)
    assert all(len(c[0]) >= 30 for c in chunks[:-1])


def test_chunks_are_normalised_unless_told_otherwise(make):
    (raw,) = make(chunk_states=10**6, normalization="none").chunks(TEXTS)
    (normal,) = make(chunk_states=10**6, folder="b").chunks(TEXTS)
    assert torch.equal(normalize_tokens(raw.states), normal.states)
    assert not torch.equal(raw.states, normal.states)


def test_chunks_do_not_depend_on_the_size_of_pieces(make, monkeypatch):
    small = collect(make(), TEXTS)
    monkeypatch.setattr(stream, "PIECE", 1000)
    assert same(small, collect(make(folder="b"), TEXTS))


@pytest.mark.parametrize("calls", range(1, 14))
def test_an_interrupted_collection_gives_the_same_chunks(make, calls):
    whole = collect(make(folder="whole"), TEXTS, limit=75)
    chunks, documents, left = [], 0, 75
    made = make()
    try:
        for chunk in made.chunks(iter(TEXTS), limit=left, progress=kill_after(calls)):
            chunks.append((chunk.states.clone(), chunk.documents, chunk.tokens))
            documents, left = chunk.documents, left - len(chunk.states)
    except Killed:
        pass
    if left:
        chunks += collect(make(), iter(TEXTS), documents_done=documents, limit=left)
    assert same(chunks, whole)


def test_an_interruption_keeps_finished_pieces(make, monkeypatch):
    with pytest.raises(Killed):
        collect(make(), TEXTS, progress=kill_after(3))
    counted = []
    windows = stream.window_states
    monkeypatch.setattr(stream, "window_states", lambda *a: counted.append(1) or windows(*a))
    (first, *_) = make().chunks(TEXTS)
    ran_again, counted[:] = len(counted), []
    (other, *_) = make(folder="fresh").chunks(TEXTS)
    assert torch.equal(first.states, other.states)
    assert 0 < ran_again < len(counted)


def test_pieces_of_a_chunk_already_learnt_are_dropped(make):
    """Killed after the trainer's checkpoint and before the chunk's pieces were cleared."""
    made = make()
    first = next(iter(made.chunks(TEXTS)))  # the generator is not resumed: nothing is cleared
    assert list(made.folder.iterdir())
    rest = collect(make(), TEXTS, documents_done=first.documents)
    whole = collect(make(folder="whole"), TEXTS)
    assert same(rest, whole[1:])


def test_the_limit_is_exact_and_no_backbone_time_is_spent_beyond_its_document(make, monkeypatch):
    ran = []
    windows = stream.window_states
    monkeypatch.setattr(stream, "window_states", lambda *a: ran.append(windows(*a)) or ran[-1])
    monkeypatch.setattr(stream, "PIECE", 1000)
    chunks = collect(make(chunk_states=1000), TEXTS, limit=17)
    assert [len(c[0]) for c in chunks] == [17]
    assert sum(len(r) for r in ran[:-1]) < 17


@pytest.mark.parametrize("limit", [None, 30, 31, 75])
def test_the_survey_foretells_the_chunks(make, limit):
    made = make()
    chunks = collect(made, TEXTS, limit=limit)
    corpus = survey(iter(TEXTS), made.maker, limit, made.chunk_states)
    assert corpus.chunks == [len(c[0]) for c in chunks]
    assert corpus.states == sum(corpus.chunks)
    assert corpus.documents == chunks[-1][1]
    assert corpus.tokens == sum(c[2] for c in chunks)


def test_empty_documents_and_an_empty_corpus(make):
    assert collect(make(), []) == []
    assert collect(make(), ["", ""]) == []
    gaps = [t for text in TEXTS for t in ("", text)] + [""]
    filled = torch.cat([c[0] for c in collect(make(), gaps)])
    assert torch.equal(filled, all_states(make(), TEXTS))


def test_nothing_is_left_in_the_folder_after_the_last_chunk(make):
    made = make()
    collect(made, TEXTS)
    assert not made.folder.exists()
