"""Whole runs: resumed, concurrent, stopped; and what they leave in the database."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chat_endpoint
import pytest
from chat_endpoint import WAIT, ChatEndpoint, failure, is_detection

from sarm.features import FeatureStore
from sarm.labels import prompts
from sarm.labels.records import Records

ROOT = Path(__file__).parents[2]


def topic(body):
    """The topic that a request is about, by its first line."""
    return body["messages"][1]["content"].split("topic")[1].split()[0].strip('."\\')


def test_labels_scores_and_what_is_kept_with_them(store, label):
    with ChatEndpoint() as server:
        report, usage = label(server.url, batch=4)
    assert (report.labelled, report.failed, report.left, report.stopped) == (4, {}, {}, None)
    assert (server.requests, usage.requests) == (4 * (1 + 3), 16)  # 12 contexts in threes of 4
    for f, found in enumerate(store.labels(method="m")):
        assert (found.feature, found.label, found.score) == (f, f"The reply mentions topic{f}.", 5)
        assert found.detection == 1.0
        assert found.details["version"] == prompts.VERSION
        assert found.details["parameters"] == {"temperature": 0, "seed": 0, "max_tokens": 512}
        counts = found.details["detection"]
        assert (counts["positives"], counts["negatives"], counts["unjudged"]) == (6, 6, 0)
        assert counts["interval"][0] < 0.9
    assert store.names()[3] == "The reply mentions topic3."


def test_the_explainer_never_sees_what_detection_asks(label):
    with ChatEndpoint() as server:
        label(server.url)
    seen = [body["messages"][1]["content"] for body in server.bodies if not is_detection(body)]
    asked = [body["messages"][1]["content"] for body in server.bodies if is_detection(body)]
    quoted = [line.partition(": ")[2] for text in asked for line in text.splitlines()[2:]]
    assert len(quoted) == 4 * 12
    assert not any(sequence in text for sequence in quoted for text in seen)


def test_a_second_run_asks_nothing(label):
    with ChatEndpoint() as server:
        label(server.url)
        before = server.requests
        report, _ = label(server.url)
        assert (report.labelled, server.requests) == (0, before)
        assert label(server.url, redo=True)[0].labelled == 4


def test_labels_by_earlier_prompts_are_made_anew(label, monkeypatch):
    with ChatEndpoint() as server:
        label(server.url)
        monkeypatch.setattr("sarm.labels.records.VERSION", "another")
        assert label(server.url)[0].labelled == 4


def test_nonsense_is_asked_for_once_more(label, store):
    def behave(number, body, server):
        return "As an AI, I" if len(body["messages"]) == 2 and not is_detection(body) else None

    with ChatEndpoint(behave) as server:
        report, usage = label(server.url)
        reminders = [b["messages"][-1]["content"] for b in server.bodies if len(b["messages"]) > 2]
    assert (report.labelled, usage.unreadable) == (4, 4)
    assert reminders == [prompts.text("explain_reminder")] * 4


def test_nonsense_twice_is_a_failure_and_no_label(label, store):
    def behave(number, body, server):
        return "As an AI, I\ncannot" if topic(body) == "2" else None

    with ChatEndpoint(behave) as server:
        report, usage = label(server.url)
        assert (report.labelled, usage.unreadable) == (3, 2)
        reason = "the answer has no explanation and score: 'As an AI, I cannot'"
        assert report.failed == {2: reason}
        assert store.labels(2) == []
        assert Records(store, "m").failures() == {2: reason}
        before = server.requests
        assert label(server.url)[0].labelled == 0  # a failure is not paid for again
        assert server.requests == before
        server.behave = lambda *_: None
        assert label(server.url, retry_failed=True)[0].labelled == 1
    assert Records(store, "m").failures() == {}


def test_nonsense_in_detection_is_not_judged(label, store):
    def behave(number, body, server):
        return "all of them" if is_detection(body) and topic(body) == "1" else None

    with ChatEndpoint(behave) as server:
        assert label(server.url)[0].labelled == 4
    (found,) = store.labels(1)
    assert (found.detection, found.score) == (None, 5)
    assert found.details["detection"]["unjudged"] == 12


def test_never_more_requests_than_allowed(label):
    def behave(number, body, server):
        if is_detection(body):  # hold until all that may come are here, and look for one more
            with server.changed:
                server.changed.wait_for(lambda: server.most >= 3, WAIT)
                server.changed.wait_for(lambda: server.most > 3, 0.02)

    with ChatEndpoint(behave) as server:
        label(server.url, concurrency=3, batch=2)
    assert server.most == 3


def test_a_run_stops_when_the_endpoint_is_of_no_use(label, store):
    with ChatEndpoint(lambda *_: failure(401, "who are you")) as server:
        report, _ = label(server.url, concurrency=1)
    assert server.requests == 1
    assert report.stopped == f"{server.url}: 401: who are you"
    assert (report.labelled, report.failed, store.labels()) == (0, {}, [])


def test_a_run_stops_after_five_features_in_a_row(label, tmp_path):
    path = chat_endpoint.make_database(tmp_path / "d.db", features=9)

    def behave(number, body, server):
        return None if topic(body) == "0" else failure(500, "out of memory")

    with ChatEndpoint(behave) as server:
        report, _ = label(server.url, path, concurrency=1, retries=0)
        line = f"{server.url}: 500: out of memory"
        assert report.stopped == f"{line}; 5 features in a row"
        assert report.left == dict.fromkeys([1, 2, 3, 4, 5], line)
        assert (report.labelled, server.requests) == (1, 4 + 5)
        server.behave = lambda *_: None  # it has recovered: the next run does the rest
        assert label(server.url, path)[0].labelled == 8


def test_some_faults_leave_features_for_another_run(label):
    with ChatEndpoint(lambda n, body, s: failure(500) if topic(body) == "1" else None) as server:
        report, _ = label(server.url, retries=0)
    assert (report.labelled, list(report.left), report.stopped) == (3, [1], None)


def test_markup_in_a_label_stays_data(label, store):
    said = 'Explanation: <script>alert(1)</script> [red]x[/] "q"; DROP TABLE label\nScore: 2'

    def behave(number, body, server):
        return "[0, 0, 0, 0]" if is_detection(body) else said

    with ChatEndpoint(behave) as server:
        label(server.url)
    found = store.labels(0)[0]
    assert found.explanation == '<script>alert(1)</script> [red]x[/] "q"; DROP TABLE label'
    assert found.detection == 0.5
    assert store.search("alert")[0].feature == 0


@pytest.mark.parametrize("same", [True, False])
def test_two_labelers_at_once_lose_nothing(tmp_path, label, same):
    path = chat_endpoint.make_database(tmp_path / "d.db", features=12)
    models = ["m", "m" if same else "other"]
    with ChatEndpoint() as server:
        threads = [
            threading.Thread(target=label, args=(server.url, path), kwargs={"model": model})
            for model in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    with FeatureStore(path) as store:
        found = [(label.feature, label.method) for label in store.labels()]
        assert sorted(found) == sorted((f, m) for m in set(models) for f in range(12))
        assert all(label.detection == 1.0 for label in store.labels())
        ((damage,),) = store.rows("PRAGMA integrity_check")
        assert damage == "ok"


def test_kill_and_resume_beside_another_labeler(tmp_path, label):
    """A process is killed at its fourth feature, while another one works on the same database."""
    path = chat_endpoint.make_database(tmp_path / "d.db", features=8)
    held = threading.Event()

    def behave(number, body, server):
        if topic(body) == "3" and not held.is_set():
            held.set()
            server.released.wait(WAIT)

    with ChatEndpoint(behave) as server:
        command = ["features", "label", path, "--base-url", server.url, "--model", "m", "--yes"]
        command += ["--concurrency", "1", "--held-out", "6", "--batch", "4"]
        process = subprocess.Popen(
            [sys.executable, "-m", "sarm", *map(str, command)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert held.wait(120)
            with FeatureStore(path) as store:  # each was committed when it was finished
                assert [x.feature for x in store.labels()] == [0, 1, 2]
            report, _ = label(server.url, path)
            assert (report.labelled, report.elsewhere) == (4, 1)  # not the one in the other's hands
            assert server.requests == 7 * 4 + 1
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        report, _ = label(server.url, path)
        assert (report.labelled, report.elsewhere) == (1, 0)
        assert server.requests == 8 * 4 + 1
    with FeatureStore(path) as store:
        assert [x.feature for x in store.labels()] == list(range(8))
    assert {p.name.partition("-")[2] for p in tmp_path.iterdir()} <= {"", "wal", "shm"}


@pytest.mark.parametrize(
    "answer", ["\ud800 lone", "x" * 3_000_000, "\x1b[2J\u202e", "\n" * 100_000]
)
def test_nonsense_is_quoted_back_within_bounds(label, answer):
    def behave(number, body, server):
        return answer if number == 0 else None

    with ChatEndpoint(behave) as server:
        report, _ = label(server.url, concurrency=1)
    assert report.labelled == 4
    assert len(server.bodies[1]["messages"][2]["content"]) <= 2000
