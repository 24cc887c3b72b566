"""A chat endpoint on loopback that misbehaves on request, and a feature database to label with it.

Feature f is active in responses that mention "topicf"; the model behind the endpoint reads that off
the sequences, as a good one would, and judges by it.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from sarm.features import FeatureStore
from sarm.features.background import BackgroundResponse, keep
from sarm.features.contexts import Entry, Span, packed, write

WAIT = 20  # seconds; every wait on an event is bounded


# ---- the database --------------------------------------------------------------------------


def make_database(path, features=4, contexts=8, dense=(), quote=lambda text: text):
    """Each feature with `contexts` top and as many sampled ones, and 60 background responses."""
    with FeatureStore(path, "rw") as store, store.transaction() as db:
        for f in range(features):
            # contribution falls with the number: the default order is 0, 1, 2, ...
            row = (f, 2 * contexts, 0.1, 1.0, 9.0, 1.0, features - f, None, None, None, 0.5, 0.1)
            db.execute(f"INSERT INTO feature VALUES ({','.join('?' * 13)})", (*row, "{}"))
            for i in range(2 * contexts):
                top = i < contexts
                text = quote(f"Reply {i} about topic{f} and word{i % 3}.")
                tokens = [*re.findall(r"\s*\S+", text), "<|im_end|>"]
                number, kind = f * 100 + i, "top" if top else "sample"
                activation = 20.0 - i if top else 1.0 + i / 100
                (line,) = packed(np.eye(len(tokens))[-1:])
                write(
                    db,
                    [Span(number, f"data.jsonl:{number} (chosen)", len(tokens) - 1, tokens)],
                    [Entry(number, f, kind, activation, number, line)],
                )
        responses = []
        for i in range(60):
            f = i % (features + 1)  # the last one is nobody's
            tokens = ["Note", f" {i}", " on", f" topic{f}", ".", "<|im_end|>"]
            active = frozenset({f, *dense}) - {features}
            responses.append((i / 60, BackgroundResponse(f"other:{i}", 5, tokens, active)))
        keep(db, responses)
    return path


# ---- the endpoint --------------------------------------------------------------------------


def good_answer(messages):
    """What a model that understands the task says."""
    question = messages[1]["content"]
    if question.startswith("Explanation:"):
        topic = re.search(r"topic\d+", question.partition("\n")[0])[0]
        lines = question.split("\n")[2:]
        return json.dumps([int(re.search(rf"{topic}\b", line) is not None) for line in lines])
    topics = [set(re.findall(r"topic\d+", line)) for line in question.splitlines()]
    (topic,) = set.intersection(*topics)
    return f"Explanation: The reply mentions {topic}.\nScore: 5"


class ChatEndpoint:
    """Answers POST /v1/chat/completions.

    behave(number, body, self): called with the number of the request from 0; returns None for a
    good answer, a string for that answer, or (status, headers, bytes). It may block.
    """

    def __init__(self, behave=lambda number, body, server: None):
        self.behave = behave
        self.bodies, self.headers = [], []
        self.in_flight = self.most = 0
        self.changed = threading.Condition()
        self.released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                owner.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def requests(self):
        return len(self.bodies)

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.changed:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            self.changed.notify_all()
        try:
            said = self.behave(number, body, self)
        finally:
            with self.changed:
                self.in_flight -= 1
                self.changed.notify_all()
        if said == "disconnect":
            handler.close_connection = True
            return
        if said is None or isinstance(said, str):
            said = completion(good_answer(body["messages"]) if said is None else said)
        status, headers, content = said
        try:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # the client has gone


def completion(text, finish="stop", usage=True):
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
            }
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def failure(status, message="no", headers=None, **fields):
    content = json.dumps({"error": {"message": message, **fields}}).encode()
    return status, {"Content-Type": "application/json", **(headers or {})}, content


def is_detection(body):
    return body["messages"][1]["content"].startswith("Explanation:")
