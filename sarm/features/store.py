"""One SQLite file with what is known of every feature: statistics, contexts, labels.

Several processes may read and write it at once (WAL, a busy timeout); several threads may share an
object. The schema is that of `sarm.features.schema`, described in docs/features.md.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sarm.errors import InputError
from sarm.features.contexts import unpacked
from sarm.features.identity import identity
from sarm.features.schema import FULL_TEXT, INDICES, SCHEMA, VERSION
from sarm.wal import write_ahead

#: Seconds that a writer waits for another one.
BUSY_SECONDS = 60.0
#: Columns a list of features may be ordered by, and the SQL of each; largest first.
ORDERS = {
    "id": "id",
    "frequency": "frequency DESC, id",
    "mean": "mean DESC, id",
    "max": "max DESC, id",
    "weight": "abs(weight) DESC, id",
    "contribution": "abs(contribution) DESC, id",
    "contrast": "abs(contrast) DESC, id",
    "length_corr": "abs(length_corr) DESC, id",
    "markdown_corr": "abs(markdown_corr) DESC, id",
}
NUMBERS = (
    "id, rows, frequency, mean, max, weight, contribution, chosen, rejected, contrast, "
    "length_corr, markdown_corr, histogram"
)


@dataclass(frozen=True)
class Label:
    """What a method calls a feature.  score: as the method defines it.  detection: balanced
    accuracy in [0, 1] of telling the feature's contexts from others by the label alone.
    """

    feature: int
    method: str
    label: str
    explanation: str | None = None
    score: float | None = None
    detection: float | None = None
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Feature:
    """Statistics of one feature over the scored tokens of all responses; see docs/features.md.

    rows: responses in which it is active (nonzero).  frequency: rows / all rows.  mean: activation
    over `rows`.  max: largest activation.  contribution: weight * activation, mean over all rows.
    chosen, rejected: summed activations.  None: not known (no pairs, no variance).
    """

    id: int
    rows: int
    frequency: float
    mean: float
    max: float
    weight: float
    contribution: float
    chosen: float | None
    rejected: float | None
    contrast: float | None
    length_corr: float | None
    markdown_corr: float | None
    histogram: dict


@dataclass(frozen=True)
class Context:
    """A span of tokens that ends at a scored token.  activation: of the feature at that token;
    activations: at each of `tokens`.  position: of the last one in its conversation, from 0.
    source: where the conversation came from.
    """

    id: int
    feature: int
    kind: str
    activation: float
    position: int
    tokens: list[str]
    activations: list[float]
    source: str

    @property
    def text(self) -> str:
        """The tokens as one string."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Hit:
    """A feature that a search found.  where: "label" or "context"; text: what matched."""

    feature: int
    where: str
    text: str


class FeatureStore:
    """A feature database.

    Args:
        path: the file; with mode "rw" it is made when missing.
        mode: "r" or "rw".
    Raises:
        FileNotFoundError: mode "r" and no file.  InputError: not a feature database, damaged, of a
        later version, or the disk is full.
    """

    def __init__(self, path: str | Path, mode: Literal["r", "rw"] = "r") -> None:
        if mode not in ("r", "rw"):
            raise InputError(f'FeatureStore: mode must be "r" or "rw", got {mode!r}')
        self.path, self.mode = Path(path), mode
        if mode == "r" and not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such feature database")
        self._lock = threading.RLock()
        if mode == "rw":
            self.path.parent.mkdir(parents=True, exist_ok=True)
        where = f"{self.path.absolute().as_uri()}?mode={'ro' if mode == 'r' else 'rwc'}"
        with self._readable():
            self._db = sqlite3.connect(
                where, uri=True, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
        try:
            with self._readable():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.create_function(
            "joined", 1, lambda tokens: "".join(json.loads(tokens)), deterministic=True
        )
        self._db.execute("BEGIN")  # one look at both: another process may be making the file
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        self._db.execute("COMMIT")
        if version > VERSION or (tables and not version):
            found = f"version {version}" if version else "the tables of something else"
            raise InputError(
                f"{self.path}: not a feature database of version {VERSION} (has {found})"
            )
        if self.mode == "rw" and not version:
            write_ahead(self._db, BUSY_SECONDS)
            with self.transaction():  # another process may be making the same file
                for statement in filter(str.strip, SCHEMA.split(";")):
                    self._db.execute(statement)
                with contextlib.suppress(sqlite3.OperationalError):  # SQLite without FTS5
                    for statement in filter(str.strip, FULL_TEXT.split(";")):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={VERSION}")
        elif not version:
            raise InputError(f"{self.path}: not a feature database (it is empty)")
        query = "SELECT count(*) FROM sqlite_master WHERE name IN ('span_words', 'label_words')"
        self.full_text = self._db.execute(query).fetchone()[0] == 2

    # ---- plumbing --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """SQLite's errors as one line: not a database, damaged, locked, no room on the disk."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise InputError(f"{self.path}: cannot be used now ({error})") from error
        except OverflowError as error:
            raise InputError(f"{self.path}: a number beyond 64 bits ({error})") from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path}: not a feature database, or damaged ({error})"
            ) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection within one transaction: all or nothing, one writer at a time."""
        with self._lock, self._readable():
            if self._db.in_transaction:  # part of a larger one
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    def index(self, db: sqlite3.Connection) -> None:
        """Make the indices over contexts; within a transaction, when all are there."""
        for statement in filter(str.strip, INDICES.split(";")):
            db.execute(statement)

    def rows(self, query: str, values: Sequence | Mapping = ()) -> list[tuple]:
        """All rows of a query."""
        with self._lock, self._readable():
            return self._db.execute(query, values).fetchall()

    def alone(self) -> bool:
        """Whether nobody else has the file open: SQLite leaves the WAL mode only then."""
        with self._lock:
            if self._db.in_transaction:
                return False
            try:
                self._db.execute("PRAGMA busy_timeout=0")
                mode = self._db.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
                self._db.execute("PRAGMA journal_mode=WAL")
                return mode == "delete"
            except sqlite3.OperationalError:  # locked
                return False
            finally:
                self._db.execute(f"PRAGMA busy_timeout={int(1000 * BUSY_SECONDS)}")

    def close(self) -> None:
        """Close the file; what was committed is in it."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # ---- whose it is -----------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, str]:
        """What the database says of itself; see docs/features.md."""
        return dict(self.rows("SELECT key, value FROM meta"))

    def set_meta(self, **values: object) -> None:
        """Write entries of `meta`; anything but a string as JSON."""
        with self.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values.items()],
            )

    def check(self, model, *, head: bool = True) -> None:
        """Refuse a model that the database was not collected with.

        Args:
            model: a `SarmForSequenceClassification`.
            head: False accepts another head on the same features, as a steered copy has it: enough
                for labels and contexts, not for weights and contributions.
        Raises:
            InputError: another model; says which.
        """
        meta, mine = self.meta, identity(model)
        for part in ("features", "head") if head else ("features",):
            if meta.get(part) != mine[part]:
                what = "model" if part == "features" else "model (its head differs)"
                raise InputError(
                    f"{self.path}: collected with another {what}: {part} fingerprint "
                    f"{meta.get(part, 'none')}, this model has {mine[part]}"
                )

    # ---- reading ---------------------------------------------------------------------------

    def feature(self, id: int) -> Feature:
        """One feature.  Raises InputError: there is none of that number."""
        found = self.rows(f"SELECT {NUMBERS} FROM feature WHERE id = ?", (id,))
        if not found:
            (count,) = self.rows("SELECT count(*) FROM feature")[0]
            raise InputError(f"{self.path}: no feature {id}; it has {count}, numbered from 0")
        return _feature(found[0])

    def features(
        self,
        order: str = "contribution",
        limit: int | None = None,
        alive: bool = True,
        offset: int = 0,
        among: Sequence[int] | None = None,
    ) -> list[Feature]:
        """Features, the largest first (by absolute value where values have a sign).

        Args:
            order: a key of `ORDERS`.
            limit: at most so many; None: all.
            alive: only those active in some response.
            offset: leave out the first so many.
            among: only these; None: all.
        """
        if order not in ORDERS:
            raise InputError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        where = "rows > 0" if alive else "TRUE"
        if among is not None:  # one variable, however many: SQLite bounds their number
            where += " AND id IN (SELECT value FROM json_each(:among))"
        return [
            _feature(row)
            for row in self.rows(
                f"SELECT {NUMBERS} FROM feature WHERE {where} ORDER BY {ORDERS[order]} "
                "LIMIT :limit OFFSET :offset",
                {
                    "limit": -1 if limit is None else limit,
                    "offset": offset,
                    "among": json.dumps(among),
                },
            )
        ]

    def contexts(
        self, id: int, kind: Literal["top", "sample"] | None = "top", limit: int | None = None
    ) -> list[Context]:
        """Contexts of a feature, the largest activation first; kind None: of both kinds."""
        return [
            _context(row)
            for row in self.rows(
                "SELECT c.id, feature, kind, activation, position, tokens, activations, source "
                "FROM context c JOIN span s ON s.id = c.span "
                "WHERE feature = :id AND (:kind IS NULL OR kind = :kind) "
                "ORDER BY activation DESC, c.id LIMIT :limit",
                {"id": id, "kind": kind, "limit": -1 if limit is None else limit},
            )
        ]

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """Features whose label or contexts hold all words of `text`, labels first, each once.

        Words match from their beginning ("recip" finds "recipe"), whatever their case.
        """
        words = [w for w in "".join(c if c.isalnum() else " " for c in text).split() if w]
        if not words:
            return []
        if self.full_text:
            match = " ".join(f'"{word}"*' for word in words)
            labels = self.rows(
                "SELECT CAST(feature AS INTEGER), 'label', text FROM label_words "
                "WHERE label_words MATCH ? ORDER BY rank, feature LIMIT ?",
                (match, limit),
            )
            contexts = self.rows(
                "SELECT feature, 'context', tokens FROM (SELECT c.feature, c.span, "
                "max(c.activation) AS most FROM span_words w JOIN context c ON c.span = w.rowid "
                "WHERE span_words MATCH ? AND c.kind = 'top' GROUP BY c.feature "
                "ORDER BY most DESC, c.feature LIMIT ?) JOIN span s ON s.id = span "
                "ORDER BY most DESC, feature",
                (match, limit),
            )
        else:
            like = [f"%{word}%" for word in words]
            for_label = " AND ".join(
                "(label || ' ' || coalesce(explanation, '')) LIKE ?" for _ in like
            )
            labels = self.rows(
                f"SELECT feature, 'label', label FROM label WHERE {for_label} "
                "ORDER BY feature LIMIT ?",
                (*like, limit),
            )
            contexts = self.rows(  # joined: a word may be several tokens
                "SELECT feature, 'context', tokens FROM span s JOIN context c ON c.span = s.id "
                f"WHERE kind = 'top' AND {' AND '.join('joined(tokens) LIKE ?' for _ in like)} "
                "GROUP BY feature "
                "ORDER BY max(activation) DESC, feature LIMIT ?",
                (*like, limit),
            )
        hits: dict[int, Hit] = {}
        for feature, where, found in [*labels, *contexts]:
            shown = "".join(json.loads(found)) if where == "context" else found
            hits.setdefault(feature, Hit(feature, where, shown))
        return list(hits.values())[:limit]

    # ---- labels ----------------------------------------------------------------------------

    def add_label(
        self,
        feature: int,
        method: str,
        label: str,
        explanation: str | None = None,
        score: float | None = None,
        detection: float | None = None,
        details: Mapping | None = None,
    ) -> None:
        """Write a method's label of a feature, replacing its earlier one."""
        row = (feature, method, label, explanation, score, detection, json.dumps(details or {}))
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO label VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            if self.full_text:
                db.execute(
                    "DELETE FROM label_words WHERE feature = ? AND method = ?", (feature, method)
                )
                words = label if explanation is None else f"{label}\n{explanation}"
                db.execute("INSERT INTO label_words VALUES (?, ?, ?)", (words, feature, method))

    def labels(self, feature: int | None = None, method: str | None = None) -> list[Label]:
        """Labels, of all features and methods unless told, by feature and then method."""
        return [
            Label(*(*row[:-1], json.loads(row[-1])))
            for row in self.rows(
                "SELECT feature, method, label, explanation, score, detection, details FROM label "
                "WHERE (:feature IS NULL OR feature = :feature) "
                "AND (:method IS NULL OR method = :method) ORDER BY feature, method",
                {"feature": feature, "method": method},
            )
        ]

    def names(self, method: str | None = None) -> dict[int, str]:
        """A label for every feature that has one: the best by detection, then by score."""
        best: dict[int, Label] = {}
        for label in self.labels(method=method):
            rank = (label.detection or 0.0, label.score or 0.0)
            had = best.get(label.feature)
            if had is None or rank > (had.detection or 0.0, had.score or 0.0):
                best[label.feature] = label
        return {feature: label.label for feature, label in best.items()}


def _feature(row: tuple) -> Feature:
    return Feature(*(*row[:-1], json.loads(row[-1])))


def _context(row: tuple) -> Context:
    return Context(*(*row[:5], json.loads(row[5]), unpacked(row[6]), row[7]))
