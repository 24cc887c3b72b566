"""Chunks of states: the same however often the run was interrupted, every state exactly once."""

import threading

import pytest
import tiny_sarm
import torch

from sarm.backbone import load_backbone
from sarm.errors import InputError
from sarm.packing import iter_token_states
from sarm.sae import normalize_tokens
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder
from sarm.training import stream
from sarm.training.activations import Window, WindowMaker, mixture, window_states
from sarm.training.stream import StateStream, survey

TEXTS = tiny_sarm.make_texts(40)


# packed passes and single windows sum in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


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
        made = StateStream(backbone, maker.end_id, tmp_path / folder, chunk_states, **options)
        made.maker = maker
        return made

    return stream_of


def all_states(stream, texts):
    """Every state of the corpus, one window at a time, without the stream."""
    states = [
        window_states(stream.backbone, window, stream.end_id)
        for windows in stream.maker.windows(texts)
        for window in windows
    ]
    return normalize_tokens(torch.cat(states))


def collect(stream, texts, **options):
    windows = stream.maker.windows(texts)
    return [(c.states.clone(), c.documents, c.tokens) for c in stream.chunks(windows, **options)]


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
    torch.testing.assert_close(torch.cat([c[0] for c in chunks]), expected, **CLOSE)
    assert all(len(c[0]) >= 30 for c in chunks[:-1])


def test_chunks_are_normalised_unless_told_otherwise(make):
    ((raw, *_),) = collect(make(chunk_states=10**6, normalization="none"), TEXTS)
    ((normal, *_),) = collect(make(chunk_states=10**6, folder="b"), TEXTS)
    assert torch.equal(normalize_tokens(raw), normal)
    assert not torch.equal(raw, normal)


def test_chunks_do_not_depend_on_the_size_of_pieces(make, monkeypatch):
    small = collect(make(), TEXTS)
    monkeypatch.setattr(stream, "PIECE", 1000)
    large = collect(make(folder="b"), TEXTS)
    assert [c[1:] for c in small] == [c[1:] for c in large]
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a[0], b[0], **CLOSE)


@pytest.mark.parametrize("calls", range(1, 14))
def test_an_interrupted_collection_gives_the_same_chunks(make, calls):
    whole = collect(make(folder="whole"), TEXTS, limit=75)
    chunks, documents, left = [], 0, 75
    made = make()
    try:
        windows = made.maker.windows(iter(TEXTS))
        for chunk in made.chunks(windows, limit=left, progress=kill_after(calls)):
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
    packed = stream.iter_last_states
    monkeypatch.setattr(
        stream, "iter_last_states", lambda b, rows: counted.extend(rows) or packed(b, rows)
    )
    (first, *_) = collect(make(), TEXTS)
    ran_again, counted[:] = len(counted), []
    (other, *_) = collect(make(folder="fresh"), TEXTS)
    assert torch.equal(first[0], other[0])
    assert 0 < ran_again < len(counted)


def test_pieces_of_a_chunk_already_learnt_are_dropped(make):
    """Killed after the trainer's checkpoint and before the chunk's pieces were cleared."""
    made = make()
    first = next(
        made.chunks(made.maker.windows(TEXTS))
    )  # the generator is not resumed: nothing is cleared
    assert list(made.folder.iterdir())
    rest = collect(make(), TEXTS, documents_done=first.documents)
    whole = collect(make(folder="whole"), TEXTS)
    assert same(rest, whole[1:])


def test_the_limit_is_exact_and_no_backbone_time_is_spent_beyond_its_document(
    make, forward_tokens, monkeypatch
):
    monkeypatch.setattr(stream, "PIECE", 1000)
    made = make("token", chunk_states=1000)
    ran = forward_tokens(made.backbone)
    chunks = collect(made, TEXTS, limit=17)
    assert [len(c[0]) for c in chunks] == [17]
    states = tokens = 0
    for windows in made.maker.windows(TEXTS):
        states += sum(len(w.positions) for w in windows)
        tokens += sum(len(w.ids) for w in windows)
        if states >= 17:
            break
    assert sum(ran) == tokens


@pytest.mark.parametrize("limit", [None, 30, 31, 75])
def test_the_survey_foretells_the_chunks(make, limit):
    made = make()
    chunks = collect(made, TEXTS, limit=limit)
    corpus = survey(made.maker.windows(iter(TEXTS)), limit, made.chunk_states)
    assert corpus.chunks == [len(c[0]) for c in chunks]
    assert corpus.states == sum(corpus.chunks)
    assert corpus.documents == chunks[-1][1]
    assert corpus.tokens == sum(c[2] for c in chunks)


def test_empty_documents_and_an_empty_corpus(make):
    assert collect(make(), []) == []
    assert collect(make(), ["", ""]) == []
    gaps = [t for text in TEXTS for t in ("", text)] + [""]
    filled = torch.cat([c[0] for c in collect(make(), gaps)])
    torch.testing.assert_close(filled, all_states(make(), TEXTS), **CLOSE)


@pytest.mark.parametrize("prefetch", [False, True])
def test_nothing_is_left_in_the_folder_after_the_last_chunk(make, prefetch):
    made = make(prefetch=prefetch)
    collect(made, TEXTS)
    assert not made.folder.exists()


def test_prefetched_chunks_have_the_same_bits(make):
    expected = collect(make(), TEXTS, limit=75)
    assert same(collect(make(folder="b", prefetch=True), TEXTS, limit=75), expected)
    assert same(collect(make(folder="c", prefetch=True), TEXTS), collect(make(), TEXTS))


def test_one_chunk_ahead_is_collected_and_no_other(make):
    """What bounds the memory: the folder has pieces of two chunks at most."""
    made = make(prefetch=True)
    seen = []

    def progress(states):
        seen.append(len(list(made.folder.iterdir())) if made.folder.exists() else 0)

    assert len(collect(made, TEXTS, progress=progress)) > 3
    assert max(seen) <= 2


def test_what_was_collected_ahead_of_a_kill_is_used(make, forward_tokens):
    whole = collect(make(folder="whole"), TEXTS)
    made, ahead = make(prefetch=True), threading.Event()

    def progress(states):  # called when a piece has been written
        if len(list(made.folder.glob("*/*"))) > pieces_of_one_chunk:
            ahead.set()

    pieces_of_one_chunk = -(-30 // 8)
    chunks = made.chunks(made.maker.windows(TEXTS), progress=progress)
    first = next(chunks)
    assert ahead.wait(30)
    chunks.close()
    later = made.folder / f"{first.documents:09d}"
    kept = len(list(later.iterdir()))
    assert kept > 0
    ran = forward_tokens(made.backbone)
    assert same(collect(make(), TEXTS, documents_done=first.documents), whole[1:])
    resumed, ran[:] = sum(ran), []
    collect(make(folder="again"), TEXTS, documents_done=first.documents)
    assert 0 < resumed < sum(ran)


# ---- every token ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [5, 64, 4096])
def test_packed_token_states_equal_each_window_alone(any_backbone, tokenizer, max_tokens):
    """Also cut into several passes; no state depends on what else is in its pass."""
    maker = WindowMaker(tokenizer, "token", context=64)
    windows = [w for found in maker.windows(TEXTS[:5]) for w in found]
    packed = dict(iter_token_states(any_backbone, [w.ids for w in windows], max_tokens))
    assert sorted(packed) == list(range(len(windows)))
    for i, window in enumerate(windows):
        alone = window_states(any_backbone, window, None)
        torch.testing.assert_close(packed[i][window.positions], alone, **CLOSE)


def test_token_windows_are_packed_without_padding(make, forward_tokens):
    made = make("token", chunk_states=10**6)
    ran = forward_tokens(made.backbone)
    lengths = [len(w.ids) for found in made.maker.windows(TEXTS) for w in found]
    collect(made, TEXTS)
    assert len(set(lengths)) > 1
    assert sum(ran) == sum(lengths)
    assert max(ran) > max(lengths)  # several in a pass


# ---- conversations -------------------------------------------------------------------------


def conversations(count=23):
    pairs = tiny_sarm.make_pairs(count)
    return [(pair["id"], pair["prompt"] + pair["chosen"]) for pair in pairs]


def mixed(made):
    return mixture(made.maker.windows(TEXTS), made.maker.scored(conversations()))


def test_a_conversation_gives_the_state_a_reward_model_scores(make, tokenizer):
    made = make(chunk_states=10**6, normalization="none")
    (chunk,) = made.chunks(made.maker.scored(conversations()))
    encoded = ConversationEncoder(tokenizer, 64).encode([turns for _, turns in conversations()])
    for state, one in zip(chunk.states, encoded, strict=True):
        hidden = made.backbone(input_ids=torch.tensor([one.ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, hidden)
    assert chunk.tokens == sum(len(one.ids) for one in encoded)


def test_a_mixture_keeps_every_document_and_balances_states():
    a = [[Window([1] * 9, list(range(9)), "token")] for _ in range(4)]
    b = [[Window([2], [0], "scored")] for _ in range(30)]
    order = [windows[0].ids[0] for windows in mixture(a, b)]
    assert order.count(1) == 4
    assert order.count(2) == 30
    #         9 states of a, then 9 of b (a tie goes to the first source), ...
    assert order == [1, *[2] * 9, 1, *[2] * 9, 1, *[2] * 9, 1, 2, 2, 2]


def test_a_mixture_of_sources_that_end_at_once():
    assert list(mixture()) == []
    assert list(mixture([], iter([]))) == []
    assert list(mixture([], [["w"]][:0], [[]])) == [[]]


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_an_interrupted_mixture_gives_the_same_chunks(make, calls):
    def run(made, **options):
        return [(c.states, c.documents, c.tokens) for c in made.chunks(mixed(made), **options)]

    whole = run(make(folder="whole", chunk_states=10**6))
    made = make(chunk_states=10**6)
    with pytest.raises(Killed):
        run(made, progress=kill_after(calls))
    assert same(run(make(chunk_states=10**6)), whole)


def test_states_of_conversations_come_from_the_cache(make, backbone, tmp_path, forward_tokens):
    def run(folder):
        with StateCache(tmp_path / "states.sqlite", backbone) as cache:
            made = make(folder=folder, chunk_states=10**6, cache=cache)
            (chunk,) = made.chunks(made.maker.scored(conversations()))
        return chunk.states

    first = run("a")
    ran = forward_tokens(backbone)
    assert torch.equal(run("b"), first)
    assert not ran
    made = make(folder="c", chunk_states=10**6)
    (chunk,) = made.chunks(made.maker.scored(conversations()))
    assert torch.equal(chunk.states, first)  # the same batches as the empty cache's
    assert ran


def test_a_conversation_the_template_refuses_is_named(make):
    bad = [*conversations(3), ("file:9", [{"role": "robot", "content": "hi"}])]
    with pytest.raises(InputError, match="file:9"):
        list(make().maker.scored(bad))


def test_states_of_an_8_bit_backbone_are_near_the_full_ones(backbone_dir, make, tmp_path):
    """Every kind of position runs on the quantised decoder."""
    for kind in ("token", "sentence", "turn-end", "last"):
        (full,) = collect(make(kind, chunk_states=10**6), TEXTS)
        small = make(kind, chunk_states=10**6)
        small.backbone = load_backbone(backbone_dir, quantization="int8")
        (rounded,) = collect(small, TEXTS)
        error = (rounded[0] - full[0]).square().sum() / full[0].square().sum()
        assert 0 < error < 0.01
        assert rounded[1:] == full[1:]
