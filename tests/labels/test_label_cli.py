"""`sarm features label` as typed."""

import logging

import pytest
from chat_endpoint import ChatEndpoint, failure, is_detection

from sarm import cli
from sarm.features import FeatureStore

KEY = "sk-secret-0123456789"


@pytest.fixture
def sarm(monkeypatch, capfd, database):
    """Run `sarm features label DATABASE ARGS...`; (exit code, stdout, stderr)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(*args):
        argv = ["sarm", "features", "label", str(database), *map(str, args)]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        done = capfd.readouterr()
        return caught.value.code or 0, done.out, done.err

    return run


def small(server, *args):
    return ("--model", "m", "--base-url", server.url, "--held-out", 6, "--batch", 6, *args)


def test_the_estimate_comes_first_and_asks_nothing(sarm, store):
    with ChatEndpoint() as server:
        code, out, _ = sarm(*small(server, "--dry-run", "--price-in", 1, "--price-out", 2))
        assert (code, server.requests) == (0, 0)
        assert out.startswith("4 of 4 features to label: about 12 requests, ")
        assert "; cost about 0." in out
        code, _, err = sarm(*small(server))  # no terminal to ask on
        assert (code, server.requests) == (2, 0)
        assert err == "sarm: features label: asks before it spends; pass --yes\n"
    assert store.labels() == []


def test_the_estimate_is_of_what_is_sent(sarm):
    from sarm.labels.estimate import tokens

    with ChatEndpoint() as server:
        _, out, _ = sarm(*small(server, "--yes"))
        sent = sum(tokens(m["content"]) + 4 for b in server.bodies for m in b["messages"])
    told = int(out.partition(" requests, ")[2].partition(" tokens")[0].replace(",", ""))
    explanations = 8 * (48 + 1)  # stood in for the real ones in 8 detection requests
    assert abs(told - sent) <= explanations


def test_a_run(sarm, store):
    with ChatEndpoint() as server:
        code, out, err = sarm(*small(server, "--yes", "--limit", 3, "--price-in", 1))
    assert (code, err) == (0, "")
    assert "The reply mentions topic0." in out
    assert "3 labelled, 0 failed, 0 left" in out
    assert "; cost 0.00" in out
    assert [x.feature for x in store.labels()] == [0, 1, 2]


def test_chosen_features(sarm, store):
    with ChatEndpoint() as server:
        assert sarm(*small(server, "--yes", "--features", "3,1"))[0] == 0
        code, _, err = sarm(*small(server, "--features", "3,99"))
        assert code == 2
        assert err.endswith("no feature 99; it has 4, numbered from 0\n")
        assert "must be numbers" in sarm(*small(server, "--features", "x"))[2]
    assert [x.feature for x in store.labels()] == [1, 3]


def test_markup_is_printed_as_it_is(sarm):
    said = "Explanation: <script>alert(1)</script> [red]x[/red] \x1b[2J\nScore: 2"

    with ChatEndpoint(lambda n, body, s: "[0]" if is_detection(body) else said) as server:
        _, out, _ = sarm(*small(server, "--yes"))
    assert "<script>alert(1)</script> [red]x[/red]" in out
    assert "\x1b[2J" not in out


def test_what_went_wrong_in_one_line(sarm):
    with ChatEndpoint(lambda *_: failure(401, "no such key")) as server:
        code, _, err = sarm(*small(server, "--yes", "--concurrency", 1))
        assert code == 2
        last = err.splitlines()[-1]
        why = f"{server.url}: 401: no such key"
        assert last == f"sarm: stopped, finished labels are kept: {why}"
    with ChatEndpoint(lambda n, body, s: failure(500) if n == 0 else None) as server:
        code, out, err = sarm(*small(server, "--yes", "--retries", 0, "--concurrency", 1))
        assert (code, "1 left for another run" in out) == (1, True)
        assert err == f"feature 0: {server.url}: 500: no\n"


@pytest.mark.parametrize("debug", [False, True])
def test_the_key_is_nowhere(sarm, tmp_path, monkeypatch, caplog, debug):
    """Not in the database, a file, the output or the log, though the endpoint echoes it."""
    if debug:
        monkeypatch.setenv("SARM_DEBUG", "0")
        for name in ("openai", "httpx2", "httpcore2", "asyncio"):
            caplog.set_level(logging.DEBUG, name)

    def behave(number, body, server):
        said = f"Explanation: {KEY} is the key\nScore: 3\n"
        return failure(403, f"{KEY} expired") if number > 8 else said

    with ChatEndpoint(behave) as server:
        _, out, err = sarm(*small(server, "--yes", "--held-out", 0, "--limit", 2))
        assert "[key] is the key" in out
        server.behave = lambda *_: failure(403, f"{KEY} expired")
        _, more, error = sarm(*small(server, "--yes"))
    assert "[key] expired" in error
    assert all(h["authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY not in out + err + more + error + caplog.text
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert files
    assert not any(KEY.encode() in f.read_bytes() for f in files)


def test_no_key(sarm, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, err = sarm("--model", "m", "--yes")
    assert code == 2
    assert err == "sarm: --key-env: the environment variable OPENAI_API_KEY is not set\n"


def test_offline(sarm, store, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, err = sarm("--offline", "--limit", 2)
    assert (code, err) == (0, "")
    assert "statistics: " in out
    assert "2 features labelled by statistics, 0 without a word" in out
    assert [x.feature for x in store.labels(method="offline")] == [0, 1]


def test_bad_input(sarm, database):
    assert sarm()[2] == ("sarm: features label: pass --model, or --offline for word statistics\n")
    with FeatureStore(database) as store:
        assert store.labels() == []
    database.unlink()
    assert "no such feature database" in sarm("--offline")[2]
    database.write_text("no database")
    assert "not a feature database" in sarm("--offline")[2]


def test_without_the_extra(sarm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    monkeypatch.delitem(__import__("sys").modules, "sarm.labels.endpoint", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "sarm.labels.run", raising=False)
    code, _, err = sarm("--model", "m")
    assert code == 2
    assert "pip install 'sarm[label]'" in err
