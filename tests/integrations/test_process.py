"""`sarm serve` as a process: announcement, signals under load, bad options."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sarm import cli
from sarm.integrations import process as serving
from sarm.integrations.client import RewardClient, RewardServerError
from sarm.integrations.server import Service

WAIT = 120


@pytest.fixture
def launched(sarm_dir):
    """(process, url) of a real server."""
    command = [sys.executable, "-m", "sarm", "serve", "-m", sarm_dir, "--port", "0",
               "--max-wait-ms", "50", "--token-env", "SARM_TEST_TOKEN"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield (
        process,
        re.fullmatch(r"serving tiny-sarm on (http://\S+)\n", process.stdout.readline()).group(1),
    )
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("SARM_TEST_TOKEN", "abc")


def test_sigterm_under_load_answers_everything_accepted_and_exits_0(token, launched, scorer, talks):
    process, url = launched
    client = RewardClient(url, token_env="SARM_TEST_TOKEN", retries=0, timeout=WAIT)
    client.wait_until_ready(WAIT)
    want = scorer.score(talks).tolist()
    served, refused, lock = [], [], threading.Lock()
    busy = threading.Event()

    def ask_until_refused(i):
        while True:
            at = (i + len(served)) % len(talks)
            try:
                (reward,) = client.score([talks[at]])
            except RewardServerError as error:
                with lock:
                    refused.append(error)
                return
            with lock:
                served.append((at, reward))
                if len(served) >= 100:
                    busy.set()

    with ThreadPoolExecutor(16) as pool:
        loops = [pool.submit(ask_until_refused, i) for i in range(16)]
        assert busy.wait(WAIT)
        before = len(served)
        process.send_signal(signal.SIGTERM)
        for loop in loops:
            loop.result(WAIT)
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, err) == (0, "")
    # a connection that is refused has no status: nobody got an error for an answer
    assert [e.status for e in refused] == [None] * 16
    assert len(served) > before  # those in flight at the signal
    for at, reward in served:
        assert reward == pytest.approx(want[at], rel=1e-5)
    answered, accepted = map(int, re.search(r"stopped: (\d+) of (\d+) requests", out).groups())
    assert answered == accepted >= len(served)


# ---- in this process: a new one costs seconds ------------------------------------------------


@pytest.fixture
def serve_command(sarm_dir, monkeypatch, capfd):
    """Run `sarm serve OPTIONS`; exit code, stdout and stderr."""

    def run(*options):
        command = ["sarm", "serve", "-m", sarm_dir, "--port", 0, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("when", ["announced", "loading"])
def test_a_signal_before_the_model_is_loaded_ends_it_at_once(when, scorer):
    end = threading.Event()
    handler = signal.getsignal(signal.SIGTERM)

    def load():
        if when == "loading":
            os.kill(os.getpid(), signal.SIGTERM)
        assert end.wait(WAIT)
        return scorer

    def announce(line):
        if when == "announced" and line.startswith("serving"):
            os.kill(os.getpid(), signal.SIGTERM)

    serving.serve(Service(load, "tiny"), serving.listen("127.0.0.1", 0), announce)
    end.set()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_bug_in_the_batching_loop_ends_the_server_and_hangs_nobody(scorer, pool, talks):
    service = Service(lambda: scorer, "tiny")

    def broken(rows, tokens, seconds):
        raise ZeroDivisionError("bug")

    service.metrics.batch = broken
    asked = []

    def ask(url):
        client = RewardClient(url, retries=0, timeout=WAIT)
        client.wait_until_ready(WAIT)
        client.score(talks[:1])

    def announce(line):
        asked.append(pool.submit(ask, line.split()[-1]))

    with pytest.raises(ZeroDivisionError):
        serving.serve(service, serving.listen("127.0.0.1", 0), announce)
    with pytest.raises(RewardServerError, match="500: RuntimeError: the scorer has stopped"):
        asked[0].result(WAIT)


def test_a_model_that_cannot_be_loaded_is_one_line_and_code_2(serve_command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, err = serve_command("-m", tmp_path / "empty")  # the last -m wins
    assert code == 2
    assert out.startswith("serving empty on http://127.0.0.1:")
    (line,) = err.splitlines()
    assert line.startswith("sarm: ")


def test_bound_elsewhere_without_a_token_it_warns(serve_command, tmp_path, token):
    (tmp_path / "empty").mkdir()
    for options, warns in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--token-env", "SARM_TEST_TOKEN"], False),
        (["--host", "127.0.0.2"], False),
        (["--host", "localhost"], False),
    ):
        _, _, err = serve_command("-m", tmp_path / "empty", *options)
        assert ("warning: 0.0.0.0 is not a loopback address" in err) == warns, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-env", "NO_SUCH_VARIABLE"], "--token-env: the environment variable NO_SUCH"),
        (["--queue-limit", 0], "serve: queue_limit must be at least 1, got 0"),
        (["--timeout", "nan"], "serve: timeout_s must be at least 0.001, got nan"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1:0"),
    ],
)
def test_bad_options_are_one_line(options, message, serve_command):
    code, out, err = serve_command(*options)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"sarm: {message}")


def test_a_taken_port_is_one_line(serve_command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = serve_command("--port", port)
    assert code == 2
    assert err.startswith(f"sarm: cannot listen on 127.0.0.1:{port} ")


def test_without_the_extra_the_error_names_it(monkeypatch, serve_command):
    for name in list(sys.modules):
        if name.startswith("sarm.integrations.") or name == "fastapi":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = serve_command()
    assert code == 2
    assert err.startswith("sarm: sarm serve needs pip install 'sarm[serve]'")


def test_small_answers_do_not_wait_for_the_clients_acknowledgement():
    with serving.listen("127.0.0.1", 0) as sock:
        with socket.create_connection(sock.getsockname()):
            accepted, _ = sock.accept()
        with (
            accepted
        ):  # header and body are two writes: Nagle's algorithm delays the second by 40 ms
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
