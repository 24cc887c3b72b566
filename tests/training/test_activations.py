"""Windows, read positions and the states at them, against running each prefix alone."""

import pytest
import tiny_sarm
import torch

from sarm.errors import InputError
from sarm.tokens import ConversationEncoder
from sarm.training.activations import POSITIONS, Window, WindowMaker, window_states


def read(tokenizer, text, kind="sentence", **options):
    ((windows),) = list(WindowMaker(tokenizer, kind, **options).windows([text]))
    return windows


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- states --------------------------------------------------------------------------------


def test_turn_end_states_equal_running_every_prefix_alone(any_backbone, tokenizer):
    text = (
        "the cat sat on a mat. it was terribly cold! why? nobody really asked; rain fell and fell"
    )
    (window,) = read(tokenizer, text, "turn-end", context=256)
    assert len(window.positions) >= 3
    end = tokenizer.eos_token_id
    states = window_states(any_backbone, window, end)
    assert states.shape == (len(window.positions), 32)
    assert states.dtype == torch.float32
    for state, position in zip(states, window.positions, strict=True):
        alone = torch.tensor([[*window.ids[: position + 1], end]])
        with torch.inference_mode():
            expected = any_backbone(input_ids=alone, use_cache=False).last_hidden_state[0, -1]
        scale = expected.abs().max().item()
        assert (state - expected).abs().max().item() <= 1e-5 * scale


@pytest.mark.parametrize("kind", ["token", "sentence"])
def test_plain_kinds_are_the_hidden_states(any_backbone, tokenizer, kind):
    (window,) = read(tokenizer, "the cat sat on a mat. it was so cold! why? nobody asked", kind)
    with torch.inference_mode():
        hidden = any_backbone(input_ids=torch.tensor([window.ids])).last_hidden_state[0]
    states = window_states(any_backbone, window, tokenizer.eos_token_id)
    assert torch.equal(states, hidden[window.positions])


def test_states_do_not_carry_gradients(backbone):
    states = window_states(backbone, Window([1, 2, 3], [2], "token"), 0)
    assert not states.requires_grad


# ---- windows and positions -----------------------------------------------------------------


def test_sentences_end_at_marks_and_special_tokens_and_short_spans_merge(tokenizer):
    # one token a character; spaces before known words are one token with the word
    text = "abcdefghij." + "xy?" + "klmnopqrs!" + "tuvwxyzabc;" + "defghijklmn<|im_end|>" + "opq"
    (window,) = read(tokenizer, text)
    ends = [window.ids[p] for p in window.positions]
    # "xy?" is shorter than 10 tokens, so its end is skipped; the tail "opq" is read at its end
    assert tokenizer.batch_decode([[e] for e in ends]) == [".", "!", ";", "<|im_end|>", "q"]
    assert window.positions == sorted(set(window.positions))


@pytest.mark.parametrize(("length", "read_there"), [(9, False), (10, True)])
def test_a_span_of_ten_tokens_is_a_sentence_and_of_nine_is_not(tokenizer, length, read_there):
    text = "x" * (length - 1) + "." + "y" * 15 + "."
    (window,) = read(tokenizer, text)
    assert (window.positions == [length - 1, length + 15]) is read_there
    assert window.positions[-1] == len(window.ids) - 1


def test_merged_spans_are_measured_from_the_last_end_that_was_read(tokenizer):
    (window,) = read(tokenizer, "aaaa." * 6)  # ends at 4, 9, 14, ...: every second one is read
    assert window.positions == [9, 19, 29]


def test_the_last_token_is_always_read_once(tokenizer):
    for text in ("no mark at the end of it", "a mark at the end of it.", "x"):
        (window,) = read(tokenizer, text)
        assert window.positions[-1] == len(window.ids) - 1
        assert len(set(window.positions)) == len(window.positions)


def test_token_kind_reads_every_token_of_the_text(tokenizer):
    (window,) = read(tokenizer, "some text", "token")
    assert window.positions == list(range(9))


def test_a_long_document_becomes_several_windows_without_losing_tokens(tokenizer):
    text = "".join(tiny_sarm.make_texts(12))
    windows = read(tokenizer, text, context=40)
    ids = ids_of(tokenizer, text)
    assert len(windows) > 3
    assert all(len(w.ids) <= 40 for w in windows)
    kept = [i for w in windows for i in w.ids]
    assert kept == ids[: len(kept)]
    assert len(ids) - len(kept) < 10  # a remainder under 10 tokens is no window
    for window in windows:
        assert window.positions[-1] == len(window.ids) - 1


def test_a_short_document_is_kept_whole(tokenizer):
    (window,) = read(tokenizer, "hey", context=40)
    assert window.ids == ids_of(tokenizer, "hey")


def test_empty_text_gives_no_window_but_counts_as_a_document(tokenizer):
    maker = WindowMaker(tokenizer, "sentence")
    lists = list(maker.windows(["", "the cat sat.", ""]))
    assert [len(windows) for windows in lists] == [0, 1, 0]


def test_windows_do_not_depend_on_how_documents_are_batched(tokenizer):
    texts = tiny_sarm.make_texts(20)
    maker = WindowMaker(tokenizer, "turn-end", context=64)
    assert list(maker.windows(texts, batch=3)) == list(maker.windows(texts, batch=256))


def test_chat_puts_the_text_behind_an_opened_assistant_turn(tokenizer):
    (window,) = read(tokenizer, "hello there", "token", chat=True)
    expected = "<|im_start|>assistant\nhello there"
    assert tokenizer.decode(window.ids) == expected
    assert tokenizer.decode([window.ids[p] for p in window.positions]) == "hello there"


def test_chat_scored_state_is_the_reward_models_scored_state(backbone, tokenizer):
    """What an SAE learns from (turn-end, last position) is what a reward model reads."""
    maker = WindowMaker(tokenizer, "turn-end", chat=True)
    ((window,),) = list(maker.windows(["the cat sat on a mat"]))
    (encoded,) = ConversationEncoder(tokenizer, 512).encode(
        [[{"role": "assistant", "content": "the cat sat on a mat"}]]
    )
    assert [*window.ids, maker.end_id] == encoded.ids


def test_the_turn_end_token_is_the_templates_not_eos():
    """Gemma and Llama-3 end a turn with a token that is not always eos."""
    template = tiny_sarm.CHATML.replace("<|im_end|>", "<|eot|>")
    tokenizer = tiny_sarm.make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eot|>"]})
    maker = WindowMaker(tokenizer, "turn-end")
    assert maker.end_id == tokenizer.convert_tokens_to_ids("<|eot|>")
    assert maker.end_id != tokenizer.eos_token_id


def test_chat_works_with_templates_that_want_a_user_first(tokenizer):
    strict = tiny_sarm.make_tokenizer(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        + tiny_sarm.CHATML
    )
    (window,) = read(strict, "hello there", "token", chat=True)
    assert strict.decode(window.ids).endswith("<|im_start|>assistant\nhello there")


# ---- refusals ------------------------------------------------------------------------------


def test_bad_kind_and_context_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"activations must be one of token, .*, got 'word'"):
        WindowMaker(tokenizer, "word")
    with pytest.raises(InputError, match="context must be at least 20 tokens, got 19"):
        WindowMaker(tokenizer, "token", context=19)


def test_a_context_the_chat_opening_fills_is_refused():
    long = tiny_sarm.make_tokenizer("{{ 'system ' * 10 }}" + tiny_sarm.CHATML)
    with pytest.raises(InputError, match="context must be at least"):
        WindowMaker(long, "token", context=40, chat=True)


def test_chat_without_a_usable_template_is_refused():
    with pytest.raises(InputError, match="chat template"):
        WindowMaker(tiny_sarm.make_tokenizer(None), "token", chat=True)
    refuses = tiny_sarm.make_tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="chat template"):
        WindowMaker(refuses, "token", chat=True)


def test_turn_end_without_any_end_token_is_refused():
    tokenizer = tiny_sarm.make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end"):
        WindowMaker(tokenizer, "turn-end")


# ---- mixtures ------------------------------------------------------------------------------


def test_a_mixture_gives_each_kind_its_share_of_states(tokenizer):
    """At any time no kind is ahead of another by more than one document's states."""
    shares = {"token": 1.0, "turn-end": 3.0, "sentence": 0.5}
    spec = ",".join(f"{kind}:{share}" for kind, share in shares.items())
    documents = list(
        WindowMaker(tokenizer, spec, context=64).windows(tiny_sarm.make_texts(300), batch=7)
    )
    given, largest = dict.fromkeys(shares, 0.0), 0.0
    for windows in documents:
        for window in windows:
            given[window.kind] += len(window.positions) / shares[window.kind]
        states = sum(len(w.positions) / shares[w.kind] for w in windows)
        largest = max(largest, states)
        assert max(given.values()) - min(given.values()) <= largest
    assert min(given.values()) > largest  # each had its turn
    again = WindowMaker(tokenizer, spec, context=64).windows(tiny_sarm.make_texts(300))
    assert documents == list(again)


def test_last_is_the_end_of_the_turn_after_the_whole_text(tokenizer):
    text = "the cat sat on a mat. it was cold"
    (window,) = read(tokenizer, text, "last")
    (whole,) = read(tokenizer, text, "turn-end")
    assert (window.kind, window.ids) == ("turn-end", whole.ids)
    assert window.positions == [len(window.ids) - 1] == whole.positions[-1:]


def test_labels_tell_sentence_ends_among_tokens(tokenizer):
    (window,) = read(tokenizer, "abcdefghij.klm", "token")
    names = [POSITIONS[label] for label in window.labels()]
    assert names == ["token"] * 10 + ["sentence"] + ["token"] * 3
    assert set(read(tokenizer, "abc. def", "turn-end")[0].labels()) == {2}


@pytest.mark.parametrize("spec", ["token:0", "token:x", "token,token", "token:-1", "token:nan"])
def test_a_mixture_without_sense_is_refused(tokenizer, spec):
    with pytest.raises(InputError, match="each kind once with a positive share"):
        WindowMaker(tokenizer, spec)
