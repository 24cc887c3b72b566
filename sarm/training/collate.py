"""Preference pairs as token ids, and batches of them packed for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sarm.data import PreferencePair
from sarm.errors import InputError
from sarm.packing import check_ids
from sarm.packing.batch import PackedBatch
from sarm.tokens import ConversationEncoder, Message
from sarm.training.bradley_terry import margins_of

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class EncodedPair:
    """int32 ids of the chosen and the rejected conversation, and where their last turns begin."""

    ids: tuple[np.ndarray, np.ndarray]
    turns: tuple[int, int]
    margin: float
    where: str


class PairDataset(Dataset):
    """Preference pairs, tokenised once; pairs whose two sides have equal tokens are left out.

    equal: how many those were.  truncated: conversations cut to the encoder's length.

    Raises:
        InputError: names the pair that cannot be tokenised or whose margin is of no use; no pair
        whose sides differ.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        encoder: ConversationEncoder,
        vocab_size: int,
        *,
        turns: bool = False,
        margin: bool | None = None,
    ) -> None:
        margins = margins_of(pairs, margin) or [0.0] * len(pairs)
        names = [(pair.where, side) for pair in pairs for side in SIDES]
        talks = [getattr(pair, side) for pair in pairs for side in SIDES]
        encoded = encoder.encode(talks, lambda i: "{} ({})".format(*names[i]))
        check_ids([e.ids for e in encoded], vocab_size)
        self.truncated = sum(e.dropped > 0 for e in encoded)
        self.pairs: list[EncodedPair] = []
        for i, pair in enumerate(pairs):
            sides = encoded[2 * i : 2 * i + 2]
            if sides[0].ids == sides[1].ids:
                continue
            starts = [len(side.ids) - 1 for side in sides]
            if turns:
                starts = [
                    max(0, turn_start(encoder, talks[2 * i + j]) - side.dropped)
                    for j, side in enumerate(sides)
                ]
            ids = tuple(np.array(side.ids, np.int32) for side in sides)
            begins = tuple(min(s, len(row) - 1) for s, row in zip(starts, ids, strict=True))
            self.pairs.append(EncodedPair(ids, begins, margins[i], pair.where))  # type: ignore[arg-type]
        self.equal = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise InputError("train-rm: no pair whose chosen and rejected differ")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        return self.pairs[index]


def turn_start(encoder: ConversationEncoder, conversation: Sequence[Message]) -> int:
    """The token at which the last message's own text begins, before any cut.

    Found by tokenising what the chat template prints before that text; 0 where a template prints
    something else than the message (then the whole conversation is its turn).
    """
    text = encoder.render(conversation)
    content = conversation[-1]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    at = text.rfind(content.strip())
    if at <= 0:
        return 0
    before, whole = encoder.tokenizer([text[:at], text], add_special_tokens=False)["input_ids"]
    same = [a == b for a, b in zip(before, whole, strict=False)]  # a token may span the border
    return same.index(False) if False in same else len(same)


def wanted_tokens(pair: EncodedPair) -> int:
    """Tokens of both last turns."""
    return sum(len(ids) - start for ids, start in zip(pair.ids, pair.turns, strict=True))


def collate(pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """Margins (B,), the packed sequences, and where the pairs come from.

    A pair's wanted tokens weigh 1 together, whatever it is packed with.
    """
    rows = [row for pair in pairs for row in pair.ids]
    starts = [start for pair in pairs for start in pair.turns]
    weights = [1 / wanted_tokens(pair) for pair in pairs for _ in SIDES]
    return {
        "margins": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        "batch": PackedBatch.of(rows, starts, weights),
        "where": [pair.where for pair in pairs],
    }
