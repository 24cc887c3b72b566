"""Conversations to ids: the scored token is the end of the last turn, whatever the template."""

import re

import pytest

from sarm import InputError
from sarm.tokens import ConversationEncoder

BOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>{% endfor %}"
)
OPEN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate\nuser/assistant') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def encode(make_tokenizer):
    def run(conversation, max_length=4096, **tokenizer):
        tokenizer = make_tokenizer(**tokenizer)
        (encoded,) = ConversationEncoder(tokenizer, max_length).encode([conversation])
        return encoded, tokenizer

    return run


def test_end_of_turn_is_last_and_the_newline_is_dropped(encode, chat):
    encoded, tokenizer = encode(chat("hi there", "hello\n\n"))
    text = tokenizer.decode(encoded.ids)
    expected = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nhello\n\n<|im_end|>"
    assert text == expected  # newlines of the answer itself stay
    assert encoded.ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert encoded.dropped == 0


@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos(adds_bos, make_tokenizer, chat):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(BOS, bos="<s>")
    bos = tokenizer.bos_token_id
    if adds_bos:  # the tokenizer would add one by itself, as Llama's does
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        assert tokenizer("a")["input_ids"][0] == bos
    (encoded,) = ConversationEncoder(tokenizer, 99).encode([chat("a", "b")])
    assert encoded.ids.count(bos) == 1
    assert encoded.ids[0] == bos


@pytest.mark.parametrize(
    "answer", ["text", "", " ", "\n", "ends with <|im_start|>", "ends with é", "😀"]
)
def test_an_open_turn_is_ended(answer, encode, chat):
    encoded, tokenizer = encode(chat("hi", answer), template=OPEN)
    expected = f"<|im_start|>user\nhi<|im_start|>assistant\n{answer}<|im_end|>"
    assert tokenizer.decode(encoded.ids) == expected


def test_an_open_turn_that_ends_itself_is_not_ended_twice(encode, chat):
    encoded, tokenizer = encode(chat("hi", "bye<|im_end|>"), template=OPEN)
    assert tokenizer.decode(encoded.ids).endswith("bye<|im_end|>")
    assert encoded.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("answer", ["", " ", "\n\n", "x"])
def test_closed_turns_with_little_in_them(answer, encode, chat):
    encoded, tokenizer = encode(chat("", answer))
    assert tokenizer.decode(encoded.ids).endswith(f"<|im_start|>assistant\n{answer}<|im_end|>")


def test_the_turn_end_need_not_be_the_eos(make_tokenizer, chat):
    # Gemma: turns end with <end_of_turn>, eos is another token
    tokenizer = make_tokenizer(eos="<s>")
    (encoded,) = ConversationEncoder(tokenizer, 99).encode([chat("a", "b")])
    assert tokenizer.decode(encoded.ids[-1:]) == "<|im_end|>"
    assert tokenizer.eos_token_id not in encoded.ids


@pytest.mark.parametrize("max_length", [2, 3, 10, 30, 31, 1000])
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_truncation_from_the_left(bos, max_length, encode, chat):
    conversation = chat("how do I reset my password?", "open the settings")
    template = {} if bos is None else {"template": BOS, "bos": bos}
    whole, _ = encode(conversation, **template)
    cut, tokenizer = encode(conversation, max_length, **template)
    assert len(cut.ids) == min(max_length, len(whole.ids))
    assert cut.dropped == len(whole.ids) - len(cut.ids)
    assert cut.ids[-1] == tokenizer.eos_token_id
    if bos is None:
        assert cut.ids == whole.ids[cut.dropped :]
    else:
        assert cut.ids[0] == tokenizer.bos_token_id
        assert cut.ids[1:] == whole.ids[1 + cut.dropped :]


def test_a_batch_is_its_members(make_tokenizer, chat):
    encoder = ConversationEncoder(make_tokenizer(), 12)
    conversations = [chat("a", "b"), chat("a longer one", "quick fox"), chat("a", "b")]
    together = encoder.encode(conversations)
    assert together == [encoder.encode([c])[0] for c in conversations]
    assert together[0] == together[2]
    assert encoder.encode([]) == []
    assert encoder.encode(iter(conversations)) == together


def test_content_parts(encode, chat):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    split = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    assert encode(split)[0] == encode(chat("hello", "hello"))[0]
    assert split[0]["content"] is parts  # the caller's messages are not changed


def test_system_and_tool_roles_and_other_keys(encode):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "y", "reasoning": None},
    ]
    encoded, tokenizer = encode(messages)
    assert tokenizer.decode(encoded.ids).count("<|im_start|>") == 4


# ---- bad input -----------------------------------------------------------------------------

GOOD = {"role": "user", "content": "a"}
END = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("conversation", "text"),
    [([], "row 7: empty conversation"),
     ((), "row 7: empty conversation"),
     ("hello", "row 7: expected a list of messages, got str"),
     (b"hello", "row 7: expected a list of messages, got bytes"),
     (None, "row 7: expected a list of messages, got NoneType"),
     (3, "row 7: expected a list of messages, got int"),
     (GOOD, "row 7: expected a list of messages, got dict"),
     ([GOOD], "row 7: the last message must be the assistant's answer, got role 'user'"),
     ([GOOD, "b"], "row 7, message 1: expected {'role', 'content'}, got 'b'"),
     ([GOOD, {"role": "assistant"}], "row 7, message 1: expected {'role', 'content'}"),
     ([{"content": "a"}, END], "row 7, message 0: expected {'role', 'content'}"),
     ([GOOD, {"role": "assistant", "content": None}], "1: role and content must be strings"),
     ([GOOD, {"role": "assistant", "content": 3}], "got content of type int"),
     ([{"role": 3, "content": "a"}, END], "message 0: role and content must be strings"),
     ([{"role": "user", "content": [{"type": "image"}]}, END], "only text content can be scored"),
     ([{"role": "user", "content": [{"type": "text"}]}, END], "only text content can be scored"),
     ([{"role": "user", "content": ["a"]}, END], "only text content can be scored"),
     ([{"role": "user", "content": "\ud83d"}, END], "message 0: content is not valid Unicode"),
     ([[END]], "row 7, message 0: expected {'role', 'content'}")],
)  # fmt: skip
def test_malformed_conversation(conversation, text, tokenizer):
    encoder = ConversationEncoder(tokenizer, 100)
    with pytest.raises(InputError, match=re.escape(text)) as caught:
        encoder.encode([[GOOD, END], conversation], lambda i: f"row {i + 6}")
    assert "\n" not in str(caught.value)


def test_role_order_the_template_refuses(make_tokenizer, chat):
    encoder = ConversationEncoder(make_tokenizer(STRICT), 100)
    encoder.encode([chat("a", "b")])
    with pytest.raises(InputError) as caught:
        encoder.encode([[GOOD, GOOD, END]])
    message = str(caught.value)
    assert message == "conversation 0: the chat template refuses it (roles must alternate)"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[5].role }}", "{{ messages[0].nothing.deep }}", "{% for %}",
     "{{ 1 / 0 if messages[0].content == 'bad' else 'x' }}",
     "{{ messages[0].content.index('q') }}", "{{ messages[0].content + 3 }}"],
)  # fmt: skip
def test_a_template_that_fails(template, make_tokenizer):
    encoder = ConversationEncoder(make_tokenizer(template), 100)
    with pytest.raises(InputError, match="conversation 0: the chat template refuses it"):
        encoder.encode([[{"role": "user", "content": "bad"}, END]])


def test_no_template(make_tokenizer, chat):
    encoder = ConversationEncoder(make_tokenizer(None), 100)
    with pytest.raises(InputError, match="conversation 0: the tokenizer has no chat template"):
        encoder.encode([chat("a", "b")])


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_too_small(max_length, tokenizer):
    with pytest.raises(InputError, match=f"max_length must be at least 2, got {max_length}"):
        ConversationEncoder(tokenizer, max_length)


def test_no_eos(make_tokenizer):
    with pytest.raises(InputError, match="no eos token"):
        ConversationEncoder(make_tokenizer(eos=None), 100)
