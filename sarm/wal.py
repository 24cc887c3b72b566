"""SQLite's write-ahead mode (https://sqlite.org/wal.html): readers beside one writer."""

from __future__ import annotations

import sqlite3
import time


def write_ahead(db: sqlite3.Connection, seconds: float = 60.0) -> None:
    """Put a database into WAL mode, also while other processes do the same.

    Two that switch at once hold what the other one needs: SQLite refuses one of them at once,
    whatever its timeout, so it is asked again here.

    Raises:
        sqlite3.OperationalError: still locked after `seconds`, or no room on the disk.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
