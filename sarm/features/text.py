"""Token ids as the pieces of text they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from sarm.locks import lock_of

UNKNOWN = "\ufffd"  # what decoding prints for a part of a character


class TokenTexts:
    """The text of every token of a sequence; joined, the text of the sequence.

    A token that is a part of a character (byte-level BPE cuts emoji, for one) gets the empty
    string, and the token that completes it the character. Leading spaces are kept, which decoding a
    token alone would drop with SentencePiece: it is decoded after an anchor. Cached by token.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        with lock_of(tokenizer):
            self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before = len(self._decode(self._anchor))

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """A string for every token."""
        texts = [self._text(i) for i in ids]
        at = 0
        while at < len(texts):
            end = at
            while end < len(texts) and UNKNOWN in texts[end]:
                end += 1
            if end > at:
                texts[at:end] = self._run(ids[at:end])
            at = end + 1
        return texts

    def _text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([*self._anchor, token])[self._before :]
        return self._known[token]

    def _run(self, ids: Sequence[int]) -> list[str]:
        """Tokens that are parts of characters, one after another."""
        texts, start = [], 0
        for end in range(1, len(ids) + 1):
            text = self._decode([*self._anchor, *ids[start:end]])[self._before :]
            if text.endswith(UNKNOWN) and end < len(ids):
                texts.append("")
            else:
                texts.append(text)
                start = end
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        with lock_of(self._tokenizer):
            return self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
