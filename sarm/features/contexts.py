"""The tables `span` and `context`: what a response's last tokens are is written once.

A response of k active features is a context of many of them; its tokens are one row of `span`, and
a context holds the feature's activation at each of them as little-endian fp32.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

TYPE = np.dtype("<f4")
#: Digits of an activation that are shown, counted from the largest one of its context.
DIGITS = 5


class Span(NamedTuple):
    """The last tokens of a response.  position: of the last one in its conversation, from 0."""

    id: int
    source: str
    position: int
    tokens: Sequence[str]


class Entry(NamedTuple):
    """A row of `context`.  activations: one of `packed`."""

    id: int
    feature: int
    kind: str
    activation: float
    span: int
    activations: bytes


def packed(activations: np.ndarray) -> list[bytes]:
    """(n, W) activations of n contexts, one a token."""
    data, step = activations.astype(TYPE).tobytes(), TYPE.itemsize * activations.shape[1]
    return [data[at : at + step] for at in range(0, len(data), step)]


def unpacked(data: bytes) -> list[float]:
    """What `packed` made of one, to `DIGITS` digits of the largest one."""
    values = np.frombuffer(data, TYPE).astype(np.float64)
    largest = np.abs(values).max(initial=0.0)
    digits = DIGITS - 1 - int(np.floor(np.log10(largest))) if largest > 0 else 0
    return values.round(digits).tolist()


def write(db: sqlite3.Connection, spans: Iterable[Span], entries: Iterable[Entry]) -> None:
    """Put both in, over those of the same ids; within a transaction."""
    db.executemany(
        "INSERT OR REPLACE INTO span VALUES (?, ?, ?, ?)",
        ((s.id, s.source, s.position, json.dumps(s.tokens, ensure_ascii=False)) for s in spans),
    )
    db.executemany("INSERT OR REPLACE INTO context VALUES (?, ?, ?, ?, ?, ?)", entries)


def sweep(db: sqlite3.Connection, used: np.ndarray) -> None:
    """Drop the spans of which no context is left.

    Args:
        used: ids of those that contexts refer to.
    """
    every = np.array([id for (id,) in db.execute("SELECT id FROM span")], np.int64)
    unused = np.setdiff1d(every, used)
    db.executemany("DELETE FROM span WHERE id = ?", ((id,) for id in unused.tolist()))


def index_words(db: sqlite3.Connection) -> None:
    """Fill the full-text index with the spans of top contexts."""
    top = "SELECT id, tokens FROM span WHERE id IN (SELECT span FROM context WHERE kind = 'top')"
    db.executemany(
        "INSERT INTO span_words (rowid, text) VALUES (?, ?)",
        ((id, "".join(json.loads(tokens))) for id, tokens in db.execute(top).fetchall()),
    )
