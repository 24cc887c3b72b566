"""What features are collected over: responses of preferences, conversations or texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sarm.data import BadRecords, Record, read_records, to_conversation, to_pair
from sarm.errors import InputError
from sarm.scorefile import sha256
from sarm.tokens import Conversation

SIDES = {"chosen": 1, "rejected": -1}


@dataclass(frozen=True)
class Response:
    """A conversation that ends with a response.  side: 1 chosen, -1 rejected, 0 neither."""

    where: str
    conversation: Conversation
    side: int = 0

    @property
    def text(self) -> str:
        """The scored turn."""
        content = self.conversation[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content)


def responses_of(record: Record) -> list[Response]:
    """Both sides of a preference; of a text the response without a prompt; else the conversation.

    Raises:
        InputError: missing fields; names the record.
    """
    fields = record.fields
    if "chosen" in fields or "rejected" in fields:
        pair = to_pair(record)
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        return [
            Response(f"{record.where} ({name})", turns, SIDES[name])
            for name, turns in sides.items()
        ]
    if "text" in fields and "messages" not in fields and "prompt" not in fields:
        if not isinstance(fields["text"], str) or not fields["text"].strip():
            raise InputError(f"{record.where}: expected text, got {str(fields['text'])[:40]!r}")
        turn = {"role": "assistant", "content": fields["text"]}
        return [Response(record.where, [turn])]
    return [Response(record.where, to_conversation(record))]


def read_all(sources: Sequence[str], bad: BadRecords) -> Iterator[Record]:
    """The records of every source in turn."""
    for source in sources:
        yield from read_records(source, bad)


def digest(sources: Sequence[str]) -> str:
    """Names what the sources hold, so that a run is not resumed on other data."""
    names = [sha256(Path(s)) if Path(s).is_file() else str(s) for s in sources]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
