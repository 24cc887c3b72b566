"""RewardClient: contracts, retries, pickling, and what it may import."""

import json
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sarm.integrations.client import RewardClient, RewardServerError

ROOT = Path(__file__).parents[2]


def test_it_scores_as_the_scorer_does(serve, scorer, talks):
    client = serve().client
    assert client.score(talks) == pytest.approx(scorer.score(talks).tolist(), rel=1e-5)
    assert client.score([]) == []
    client.batch_size = 7
    assert client.score(talks) == pytest.approx(scorer.score(talks).tolist(), rel=1e-5)


def test_it_is_a_trl_reward_function(serve, scorer, talks):
    client = serve().client
    prompts = [t[:1] for t in talks[:3]]
    completions = [talks[0][1:], None, talks[2][1:]]
    want = scorer(prompts=prompts, completions=completions)
    got = client(prompts=prompts, completions=completions, completion_ids=[[1]] * 3, other=[1] * 3)
    assert got[1] is None
    assert [got[0], got[2]] == pytest.approx([want[0], want[2]], rel=1e-5)
    plain = client(prompts=["why"], completions=["so cold"])
    assert plain == pytest.approx(scorer(prompts=["why"], completions=["so cold"]), rel=1e-5)
    assert client.__name__ == "sarm_reward"
    with pytest.raises(ValueError, match="equally many"):
        client(prompts=["why"], completions=[])


def test_pickled_it_carries_no_token(serve, talks, monkeypatch):
    server = serve(token="hush")
    client = RewardClient(server.url, token_env="A_TOKEN", retries=0)
    monkeypatch.setenv("A_TOKEN", "wrong")
    with pytest.raises(RewardServerError, match="401: wrong or missing bearer token"):
        client.score(talks[:1])
    monkeypatch.setenv("A_TOKEN", "hush")
    packed = pickle.dumps(client)
    assert b"hush" not in packed
    assert pickle.loads(packed).score(talks[:1]) == client.score(talks[:1])


def test_explain(serve, scorer, talks):
    explained = serve().client.explain(talks[0], top=3)
    assert len(explained["contributions"]) == 3
    assert explained["reward"] == pytest.approx(scorer.explain(talks[0]).reward, rel=1e-5)


def test_errors_name_url_status_and_item(serve):
    server = serve()
    with pytest.raises(RewardServerError) as refused:
        server.client.score([[{"role": "user", "content": "x"}]])
    assert refused.value.status == 422
    assert str(refused.value).startswith(f"{server.url}/score: 422: conversations[0]: the last")
    with pytest.raises(RewardServerError, match="refused"):
        RewardClient("http://127.0.0.1:9", retries=0).score([[]])
    with pytest.raises(ValueError, match="must begin with http"):
        RewardClient("localhost:8000")


@pytest.fixture
def scripted():
    """scripted([(status, body), ...]) -> url of a server that gives these answers in turn."""
    servers = []

    def start(answers):
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                status, body = left.pop(0)
                if status is None:  # a connection that breaks
                    self.close_connection = True
                    return
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", left

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


FULL = (429, {"error": {"message": "full"}})


def test_it_tries_again_when_that_may_help(scripted, monkeypatch):
    waits = []
    monkeypatch.setattr("sarm.integrations.client.time.sleep", waits.append)
    url, left = scripted([FULL, (None, None), (503, {}), (200, {"rewards": [1.5]})])
    assert RewardClient(url, retries=3).score([[]]) == [1.5]
    assert left == []
    assert len(waits) == 3
    assert all(0.5 * 0.25 * 2**i <= w <= 0.25 * 2**i for i, w in enumerate(waits))


def test_it_gives_up_after_so_many_tries_and_never_on_a_bad_request(scripted, monkeypatch):
    monkeypatch.setattr("sarm.integrations.client.time.sleep", lambda seconds: None)
    url, left = scripted([FULL] * 3)
    with pytest.raises(RewardServerError, match="429: full"):
        RewardClient(url, retries=1).score([[]])
    assert len(left) == 1
    url, left = scripted([(500, {"error": {"message": "the reward is nan"}})] * 2)
    with pytest.raises(RewardServerError, match="500: the reward is nan"):
        RewardClient(url, retries=5).score([[]])
    assert len(left) == 1


def test_too_few_rewards_are_an_error(scripted):
    url, _ = scripted([(200, {"rewards": []})])
    with pytest.raises(RewardServerError, match="1 items sent, 0 rewards received"):
        RewardClient(url).score([[]])


def test_adapters_work_beside_another_transformers(tmp_path):
    """Training stacks pin other versions: the client and adapters must import all the same."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.40.0'\n")
    code = (
        "import sys, sarm.integrations.verl, sarm.integrations.openrlhf, sarm.integrations.client\n"
        "print(sorted({'fastapi', 'uvicorn', 'verl', 'pydantic'} & set(sys.modules)))\n"
        "import sarm\n"
        "try: sarm.SARMScorer\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "[]"
    assert second.startswith("sarm.SARMScorer: ")
    assert "transformers" in second
