"""What a request asks to be scored, checked and tokenised; an error names item and field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sarm.data import Record, join_turns, to_conversation
from sarm.errors import InputError
from sarm.scorer import SARMScorer
from sarm.tokens import ConversationEncoder, Encoded


@dataclass(frozen=True)
class Encoding:
    """How items become token ids.

    add_bos: texts that lack the BOS which the tokenizer adds by itself get it.
    max_length: tokens kept of an item, from its end; None: the scorer's.
    cut: whether longer items are cut, or refused.
    """

    add_bos: bool = False
    max_length: int | None = None
    cut: bool = True


@dataclass(frozen=True)
class Inputs:
    """Items of one kind: conversations, rendered texts, or token ids.

    field: where they stand in the request's body; one that is not in a list (`single`) has no
    index.
    """

    field: str
    kind: Literal["conversation", "text", "ids"]
    values: list[Any]
    single: bool = False

    def where(self, i: int) -> str:
        """Names item i in an error message."""
        return self.field if self.single else f"{self.field}[{i}]"


def conversations(field: str, values: list[Any]) -> Inputs:
    """Lists of chat messages."""
    return Inputs(field, "conversation", values)


def rows(field: str, values: list[Any]) -> Inputs:
    """Objects as `sarm score` reads them: `messages`, or `prompt` with `completion`."""
    turns = []
    for i, value in enumerate(values):
        where = f"{field}[{i}]"
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected an object, got {type(value).__name__}")
        turns.append(to_conversation(Record(where, value)))
    return Inputs(field, "conversation", turns)


def one_row(fields: dict[str, Any]) -> Inputs:
    """The one conversation of a body with `messages`, or `prompt` with `completion`."""
    if fields.get("messages") is not None:
        return Inputs("messages", "conversation", [fields["messages"]], single=True)
    if fields.get("prompt") is None or fields.get("completion") is None:
        raise InputError("body: expected `messages`, or `prompt` and `completion`")
    turns = join_turns(fields["prompt"], fields["completion"], "prompt")
    return Inputs("prompt", "conversation", [turns], single=True)


def vllm_input(messages: Any, value: Any) -> Inputs:
    """vLLM's `messages`, or `input`: a string, strings, token ids, or lists of token ids."""
    if (messages is None) == (value is None):
        raise InputError("body: expected one of `input` and `messages`")
    if messages is not None:
        return Inputs("messages", "conversation", [messages], single=True)
    if isinstance(value, str):
        return Inputs("input", "text", [value], single=True)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise InputError(f"input: expected a string, strings or token ids, got {got}")
    if isinstance(value[0], str):
        return Inputs("input", "text", value)
    if isinstance(value[0], list):
        return Inputs("input", "ids", value)
    return Inputs("input", "ids", [value], single=True)


class Codec:
    """Items to token ids as the scorer sees them.

    A rendered text is tokenised as it is, special tokens included: no second BOS, the end of the
    turn appended where it is missing.
    """

    def __init__(self, scorer: SARMScorer) -> None:
        self.scorer = scorer
        self.max_length = scorer.max_length
        self.vocab_size = scorer.model.config.vocab_size
        self._encoder = None
        self._bos: str | None = None
        if scorer.tokenizer is not None:
            self._encoder = ConversationEncoder(scorer.tokenizer, scorer.max_length)
            bos_id = scorer.tokenizer.bos_token_id
            if bos_id is not None and scorer.tokenizer("a")["input_ids"][0] == bos_id:
                self._bos = scorer.tokenizer.bos_token

    def encode(self, inputs: Inputs, how: Encoding) -> list[Encoded]:
        """Token ids of every item, or an InputError that names the first it cannot take."""
        encoded = self._encode(inputs, how)
        if not how.cut:
            for i, item in enumerate(encoded):
                if item.dropped:
                    raise InputError(
                        f"{inputs.where(i)}: {len(item.ids) + item.dropped} tokens, more than "
                        f"{self.max_length}; set truncate_prompt_tokens to cut it"
                    )
        return encoded

    def _encode(self, inputs: Inputs, how: Encoding) -> list[Encoded]:
        limit = min(how.max_length or self.max_length, self.max_length)
        if inputs.kind == "ids":
            return [self._ids(ids, inputs.where(i), limit) for i, ids in enumerate(inputs.values)]
        if self._encoder is None:
            raise InputError(f"{inputs.field}: this SARM has no tokenizer; send token ids")
        encoder = self._encoder
        if limit != self.max_length:
            encoder = ConversationEncoder(self.scorer.tokenizer, limit)
        if inputs.kind == "conversation":
            if encoder is self._encoder:
                return self.scorer.encode(inputs.values, inputs.where)
            return encoder.encode(inputs.values, inputs.where)
        texts = [check_text(text, inputs.where(i)) for i, text in enumerate(inputs.values)]
        if how.add_bos and self._bos:
            texts = [t if t.startswith(self._bos) else self._bos + t for t in texts]
        return encoder.encode_texts(texts)

    def _ids(self, ids: Any, where: str, limit: int) -> Encoded:
        if not isinstance(ids, list) or not ids:
            got = "an empty list" if ids == [] else type(ids).__name__
            raise InputError(f"{where}: expected a list of token ids, got {got}")
        for at, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                got = type(token).__name__
                raise InputError(f"{where}: token {at}: expected an integer, got {got}")
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"{where}: token {at}: id {token} is not in [0, {self.vocab_size})"
                )
        return Encoded(ids[-limit:], max(0, len(ids) - limit))


def check_text(text: Any, where: str) -> str:
    """A string with something to score, or an InputError that names `where`."""
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, got {type(text).__name__}")
    if not text:
        raise InputError(f"{where}: empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud83d"
        raise InputError(f"{where}: not valid Unicode ({error.reason})") from error
    return text
