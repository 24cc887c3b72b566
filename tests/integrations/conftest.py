"""A server on a real socket, in this process, around a tiny SARM."""

import contextlib
import http.client
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

import sarm
from sarm.integrations.client import RewardClient
from sarm.integrations.process import Server, listen
from sarm.integrations.server import ServeConfig, Service

WAIT = 30  # seconds; every wait on an event is bounded


def make_scorer(folder, max_length=512):
    """A SARM of random weights, saved to `folder` as `sarm train-rm` would."""
    tiny_sarm.save_backbone(folder / "backbone")
    backbone = sarm.load_backbone(folder / "backbone", dtype=torch.float32, device="cpu")
    torch.manual_seed(3)
    sae = sarm.TopKSAE(backbone.config.hidden_size, 64, 6)
    model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, torch.randn(1, 64))
    return sarm.SARMScorer(model, tiny_sarm.make_tokenizer(), max_length=max_length)


@pytest.fixture(scope="session")
def scorer(tmp_path_factory):
    return make_scorer(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def sarm_dir(scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-sarm"
    scorer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talks():
    """Conversations of different lengths."""
    return [[*r["prompt"], *r[side]] for r in tiny_sarm.make_pairs(20) for side in
            ("chosen", "rejected")]  # fmt: skip


class Probe:
    """Stands in for a scorer: records what it is asked to score, and can be held."""

    def __init__(self, scorer):
        self._scorer = scorer
        self.batches = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = {}  # last token id -> reward it gets, or exception

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score_token_ids(self, rows):
        self.batches.append([list(row) for row in rows])
        self.started.release()
        assert self.gate.wait(WAIT)
        rewards = self._scorer.score_token_ids(rows)
        for i, row in enumerate(rows):
            problem = self.broken.get(row[0])
            if isinstance(problem, Exception):
                raise problem
            if problem is not None:
                rewards[i] = problem
        return rewards

    def wait_for_batch(self):
        assert self.started.acquire(timeout=WAIT)


@dataclass
class Answer:
    status: int
    headers: dict
    body: dict

    @property
    def message(self):
        return self.body["error"]["message"]


class Running:
    """A started server and ways to talk to it."""

    def __init__(self, service, port):
        self.service, self.port = service, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = RewardClient(self.url, retries=0, timeout=WAIT)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)

    def ask(self, path, body=None, headers=None, raw=None):
        connection = self.connect()
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request("POST" if data is not None else "GET", path, data, headers or {})
            response = connection.getresponse()
            text = response.read()
            kind = response.headers.get("content-type", "")
            found = json.loads(text) if "json" in kind else text.decode()
            return Answer(response.status, dict(response.headers), found)

    def metric(self, name):
        """The value of one line of /metrics."""
        for line in self.ask("/metrics").body.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        raise KeyError(name)


@pytest.fixture
def serve(scorer):
    """serve(scorer, token=None, **config) -> Running; stopped, and checked, at the end."""
    with contextlib.ExitStack() as stack:

        def start(use=None, token=None, wait=True, load=None, **config):
            load = load or (lambda: use if use is not None else scorer)
            config.setdefault("max_wait_ms", 0)
            service = Service(load, "tiny", ServeConfig(**config), token=token)
            sock = listen("127.0.0.1", 0)
            server = Server(service)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
            thread.start()

            def stop():
                server.stop()
                thread.join(WAIT)
                assert not thread.is_alive()

            stack.callback(stop)
            running = Running(service, sock.getsockname()[1])
            if wait:
                running.client.wait_until_ready(WAIT)
            return running

        yield start


@pytest.fixture
def probe(scorer):
    made = Probe(scorer)
    yield made
    made.gate.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(max_workers=64) as made:
        yield made
