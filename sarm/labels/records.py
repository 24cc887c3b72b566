"""What is labelled already, what failed and why, and who works on what just now.

Every result is one transaction: after `kill -9` a run goes on with what is missing. Failures have a
table of their own: an answer that could not be read must not look like a label.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from sarm.features import FeatureStore
from sarm.labels.prompts import VERSION

FAILURES = """
CREATE TABLE IF NOT EXISTS label_failure (
    feature INTEGER NOT NULL,
    method TEXT NOT NULL,
    reason TEXT NOT NULL,
    version TEXT NOT NULL,
    PRIMARY KEY (feature, method)
)"""


class Records:
    """The labels and failures of one method in a database opened with mode "rw"."""

    def __init__(self, store: FeatureStore, method: str) -> None:
        self.store, self.method = store, method
        self.labelled = self.failed = 0
        with store.transaction() as db:
            db.execute(FAILURES)

    def done(self) -> set[int]:
        """Features with a label by these prompts."""
        rows = self.store.rows(
            "SELECT feature FROM label WHERE method = ? AND json_extract(details, '$.version') = ?",
            (self.method, VERSION),
        )
        return {feature for (feature,) in rows}

    def has(self, feature: int) -> bool:
        """Whether a feature has a label by these prompts, perhaps since a moment ago."""
        query = (
            "SELECT 1 FROM label WHERE feature = ? AND method = ? "
            "AND json_extract(details, '$.version') = ?"
        )
        return bool(self.store.rows(query, (feature, self.method, VERSION)))

    def failures(self) -> dict[int, str]:
        """Features that these prompts could not label, and why."""
        query = "SELECT feature, reason FROM label_failure WHERE method = ? AND version = ?"
        return dict(self.store.rows(query, (self.method, VERSION)))

    def add(
        self,
        feature: int,
        label: str,
        explanation: str,
        score: float | None,
        detection: float | None,
        details: dict,
    ) -> None:
        """Write a label; an earlier failure is forgotten."""
        details = {"version": VERSION, **details}
        with self.store.transaction() as db:
            self.store.add_label(
                feature, self.method, label, explanation, score, detection, details
            )
            self._forget(db, feature)
        self.labelled += 1

    def fail(self, feature: int, reason: str) -> None:
        """Write why there is no label; an earlier label stays."""
        with self.store.transaction() as db:
            self._forget(db, feature)
            row = (feature, self.method, reason, VERSION)
            db.execute("INSERT INTO label_failure VALUES (?, ?, ?, ?)", row)
        self.failed += 1

    def _forget(self, db, feature: int) -> None:
        db.execute(
            "DELETE FROM label_failure WHERE feature = ? AND method = ?", (feature, self.method)
        )


class Claims:
    """Keeps two labelers of one database from paying for the same feature.

    A claim is a lock on one byte of a file beside the database: the system drops it when its
    process ends, however it ends. Claims save requests; nothing is lost without them.
    """

    def __init__(self, database: Path, method: str) -> None:
        self.path = database.with_name(f"{database.name}-labelling")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._base = (zlib.crc32(method.encode()) >> 1) << 32

    @contextlib.contextmanager
    def claim(self, feature: int) -> Iterator[bool]:
        """Whether no other process works on the feature; held until the end of the block."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._base + feature)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._base + feature)

    def close(self) -> None:
        """Remove the file when nobody else claims anything."""
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        os.close(self._file)
