"""The database: whose it is, search, labels, several writers, damaged files."""

import multiprocessing
import sqlite3
import threading

import numpy as np
import pytest

from sarm.errors import InputError
from sarm.features import FeatureStore, contexts


def test_another_model_is_refused(database, scorer, tiny_scorer):
    with FeatureStore(database) as store:
        store.check(scorer.model)
        store.check(tiny_scorer(quantization="int8").model)  # the same features
        with pytest.raises(InputError, match="another model: features fingerprint"):
            store.check(tiny_scorer(seed=1).model)
        with pytest.raises(InputError, match="another model: features fingerprint"):
            store.check(tiny_scorer(k=7).model)
        steered = scorer.steer({3: 2.0}).model
        store.check(steered, head=False)
        with pytest.raises(InputError, match="its head differs"):
            store.check(steered)


def test_order_limit_and_dead_features(database):
    with FeatureStore(database) as store:
        everything = store.features("id", alive=False)
        alive = store.features("id")
        assert [f for f in everything if f.rows] == alive
        by_weight = store.features("contribution")
        sizes = [abs(f.contribution) for f in by_weight]
        assert sizes == sorted(sizes, reverse=True)
        assert store.features("contribution", limit=3, offset=2) == by_weight[2:5]
        assert store.feature(alive[0].id) == alive[0]
        with pytest.raises(InputError, match="no feature 64; it has 64, numbered from 0"):
            store.feature(64)
        with pytest.raises(InputError, match="order must be one of"):
            store.features("id; DROP TABLE feature")


@pytest.mark.parametrize("full_text", [True, False])
def test_search(tmp_path, full_text):
    with FeatureStore(tmp_path / "f.db", "rw") as store:
        assert store.full_text
        store.add_label(5, "llm", "Refusals, politely", "says it cannot help")
        store.add_label(5, "llm", "Refusals", "says it cannot help")  # replaces
        store.add_label(9, "llm", "Recipes", score=4.0)
        with store.transaction() as db:
            (line,) = contexts.packed(np.array([[0, 1]]))
            span = contexts.Span(3, "f:1", 3, ["a cake", " recipe"])
            kinds = (1, 7, "top"), (2, 8, "sample")  # words of samples alone are not searched
            entries = [contexts.Entry(*kind, 1.0, 3, line) for kind in kinds]
            contexts.write(db, [span], entries)
            contexts.index_words(db)
        store.full_text = full_text
        assert [(h.feature, h.where) for h in store.search("RECIPE")] == [
            (9, "label"), (7, "context"),
        ]  # fmt: skip
        assert store.search("cake rec")[0].text == "a cake recipe"
        assert [h.feature for h in store.search("cannot refus")] == [5]
        assert store.search("politely") == []
        for nothing in ("", '"', "* OR -", "NEAR(", "%"):
            assert isinstance(store.search(nothing), list)
        assert store.names() == {5: "Refusals", 9: "Recipes"}


def test_labels_keep_what_they_are_given(tmp_path):
    with FeatureStore(tmp_path / "f.db", "rw") as store:
        store.add_label(1, "a", "one", None, 3.0, 0.9, {"prompt": 2})
        store.add_label(1, "b", "uno", None, 5.0, 0.6)
        found = store.labels(feature=1)
        assert [(x.method, x.label, x.details) for x in found] == [
            ("a", "one", {"prompt": 2}), ("b", "uno", {}),
        ]  # fmt: skip
        assert store.names() == {1: "one"}  # detection goes before the score
        assert store.names("b") == {1: "uno"}
        assert store.labels(method="c") == []


def write(path, method, both):
    both.wait(timeout=300)  # both make the file at once
    with FeatureStore(path, "rw") as store:
        for feature in range(60):
            store.add_label(feature, method, f"{method} {feature}")


def test_two_processes_write_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    both = spawn.Barrier(2)
    other = spawn.Process(target=write, args=(tmp_path / "f.db", "a", both))
    other.start()
    write(tmp_path / "f.db", "b", both)
    other.join()
    assert other.exitcode == 0
    with FeatureStore(tmp_path / "f.db") as store:
        assert [(x.feature, x.method) for x in store.labels()] == [
            (feature, method) for feature in range(60) for method in "ab"
        ]
        assert len(store.search("a 7")) == 1


def test_another_process_makes_the_file_meanwhile(tmp_path, monkeypatch):
    """Between a look at the version and one at the tables."""
    path, others = tmp_path / "f.db", []

    class Interrupted(sqlite3.Connection):
        def execute(self, query, *values):
            found = super().execute(query, *values)
            if query == "PRAGMA user_version" and not others:
                found = iter(found.fetchall())
                others.append(threading.Thread(target=lambda: FeatureStore(path, "rw").close()))
                others[0].start()
                others[0].join(timeout=0.5)  # it may have to wait for us
                return Rows(found)
            return found

    class Rows:
        def __init__(self, rows):
            self.fetchone = lambda: next(rows)

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *a, **options: connect(*a, factory=Interrupted, **options)
    )
    FeatureStore(path, "rw").close()
    others[0].join()
    with FeatureStore(path) as store:
        assert store.labels() == []


def test_files_that_are_no_feature_database(tmp_path, database):
    with pytest.raises(FileNotFoundError, match="no such feature database"):
        FeatureStore(tmp_path / "none.db")
    text = tmp_path / "text.db"
    text.write_text("not a database " * 100)
    with pytest.raises(InputError, match="not a feature database, or damaged"):
        FeatureStore(text)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE states (key)")
    for mode in ("r", "rw"):
        with pytest.raises(InputError, match="has the tables of something else"):
            FeatureStore(other, mode)
    later = tmp_path / "later.db"
    with sqlite3.connect(later) as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(InputError, match=r"version 2 .has version 9"):
        FeatureStore(later)
    (tmp_path / "empty.db").touch()
    with pytest.raises(InputError, match="it is empty"):
        FeatureStore(tmp_path / "empty.db")
    damaged = tmp_path / "damaged.db"
    content = bytearray(database.read_bytes())
    content[4096:] = b"\x07" * (len(content) - 4096)
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="damaged"), FeatureStore(damaged) as store:
        store.features()


def test_a_reader_cannot_write(database):
    with FeatureStore(database) as store, pytest.raises(InputError, match="readonly"):
        store.add_label(1, "a", "b")


def test_numbers_beyond_sqlites_are_one_line(database):
    with FeatureStore(database) as store:
        for ask in (
            lambda: store.feature(10**30),
            lambda: store.features(limit=10**30),
            lambda: store.contexts(0, limit=2**63),
        ):
            with pytest.raises(InputError, match=r"f.*\.db: "):
                ask()


@pytest.mark.parametrize("full_text", [True, False])
def test_words_of_several_tokens_and_odd_characters(tmp_path, full_text):
    with FeatureStore(tmp_path / "f.db", "rw") as store:
        store.full_text = full_text
        with store.transaction() as db:
            (line,) = contexts.packed(np.array([[0, 1]]))
            span = contexts.Span(0, "made up", 1, ["rain", 'fall "x"'])
            contexts.write(db, [span], [contexts.Entry(0, 1, "top", 1.0, 0, line)])
            contexts.index_words(db)
        assert [hit.feature for hit in store.search("rainfall")] == [1]
        assert [hit.feature for hit in store.search("x")] == [1]
        for odd in (
            "²",
            "\U0001d7d8",
            "\u0378",
            "\U000323af",
            "\x00",
            "%",
            '"',
            "NEAR(",
            "a" * 10_000,
        ):
            assert store.search(odd) == [], odd
