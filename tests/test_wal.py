"""Write-ahead mode, switched on by several connections at once."""

import sqlite3
import threading

import pytest

from sarm.wal import write_ahead


def test_connections_that_switch_at_once(tmp_path):
    """Without asking again, about every tenth of these files refused one of the three."""
    found, together = [], threading.Barrier(3)

    def switch():
        for number in range(200):
            with sqlite3.connect(tmp_path / f"{number}.db", timeout=60) as db:
                together.wait()
                try:
                    write_ahead(db)
                    db.execute("CREATE TABLE IF NOT EXISTS numbers (number INTEGER)")
                except sqlite3.OperationalError as error:
                    found.append(error)
            db.close()

    threads = [threading.Thread(target=switch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == []
    with sqlite3.connect(tmp_path / "0.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_somebody_who_never_lets_go(tmp_path):
    holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    other = sqlite3.connect(tmp_path / "a.db", timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        write_ahead(other, seconds=0.05)
    holder.execute("ROLLBACK")
    write_ahead(other, seconds=0.05)
    other.close()
    holder.close()
