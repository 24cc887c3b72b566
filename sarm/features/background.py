"""A uniform sample of all responses with the features active in each: exact negatives.

The contexts of a feature say where it is active. Where it is *not* cannot be told from the contexts
of others, for these are few and every response has k active features; so some responses are kept
with all of theirs. 1,000 responses of 64 tokens and 192 active features are 2 MB.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sarm.features.best import uniform
from sarm.features.store import FeatureStore

#: Responses kept.
SIZE = 1000


@dataclass(frozen=True)
class BackgroundResponse:
    """The span that ends at a response's scored token, and the features active there."""

    source: str
    position: int
    tokens: list[str]
    active: frozenset[int]

    @property
    def text(self) -> str:
        """The tokens as one string."""
        return "".join(self.tokens)


def rank(row: int, seed: int) -> float:
    """The sample is the rows of lowest rank: a hash, so a resumed run keeps the same ones."""
    return float(uniform(np.array([row]), np.array([0]), ~seed & 0xFFFFFFFF)[0])


def keep(
    db: sqlite3.Connection, responses: Iterable[tuple[float, BackgroundResponse]], size: int = SIZE
) -> None:
    """Offer (rank, response) of a block; within its transaction."""
    db.executemany(
        "INSERT OR REPLACE INTO background VALUES (?, ?, ?, ?, ?)",
        (
            (
                key,
                r.source,
                r.position,
                json.dumps(r.tokens, ensure_ascii=False),
                json.dumps(sorted(r.active), separators=(",", ":")),
            )
            for key, r in responses
        ),
    )
    db.execute(
        "DELETE FROM background WHERE rank NOT IN "
        "(SELECT rank FROM background ORDER BY rank LIMIT ?)",
        (size,),
    )


def background(store: FeatureStore) -> list[BackgroundResponse]:
    """The sample of a database, in random order; empty where none was collected."""
    if not store.rows("SELECT 1 FROM sqlite_master WHERE name = 'background'"):
        return []
    rows = store.rows("SELECT source, position, tokens, active FROM background ORDER BY rank")
    return [
        BackgroundResponse(source, position, json.loads(tokens), frozenset(json.loads(active)))
        for source, position, tokens, active in rows
    ]
