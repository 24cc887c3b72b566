"""An endpoint that misbehaves: each way has its one line, and the key is in none of them."""

import asyncio
import socket
import traceback

import chat_endpoint
import pytest
from chat_endpoint import ChatEndpoint, completion, failure

from sarm.errors import InputError
from sarm.labels.endpoint import (
    DEFAULT_URL,
    MAX_ANSWER_BYTES,
    Endpoint,
    EndpointError,
    Refused,
    Settings,
    key_from,
)

KEY = "sk-secret-0123456789"
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": 'Activation: 1.00  Sequence: "topic1"'},
]


def ask(url, **settings):
    settings = {"timeout": 5.0, "retries": 2, **settings}

    async def work():
        async with Endpoint(Settings("m", url, **settings), KEY) as endpoint:
            return await endpoint.ask(MESSAGES), endpoint

    return asyncio.run(work())


def asked(behave, **settings):
    with ChatEndpoint(behave) as server:
        return *ask(server.url, **settings), server


def fails(behave, kind=EndpointError, **settings):
    """(the line, requests made) of an endpoint that does not answer."""
    with ChatEndpoint(behave) as server:
        with pytest.raises(kind) as caught:
            ask(server.url, **settings)
        said = "".join(traceback.format_exception(caught.value))
        assert KEY not in said + repr(caught.value)
        line = str(caught.value)
        assert line.startswith(server.url)
        assert "\n" not in line
        return line.removeprefix(f"{server.url}: "), server.requests, caught.value


def test_a_good_answer_and_what_was_asked():
    answer, endpoint, server = asked(lambda *_: None)
    assert answer == "Explanation: The reply mentions topic1.\nScore: 5"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0, 0)
    assert body["max_tokens"] == 512
    assert body["messages"] == MESSAGES
    usage = endpoint.usage
    assert (usage.requests, usage.retries, usage.tokens_in, usage.tokens_out) == (1, 0, 100, 10)


def test_429_waits_as_long_as_told(monkeypatch):
    waits = []
    real = asyncio.sleep

    async def sleep(seconds, *rest):
        waits.append(seconds)
        await real(0, *rest)

    from openai import _base_client

    monkeypatch.setattr(_base_client.anyio, "sleep", sleep)
    _, endpoint, server = asked(
        lambda n, *_: failure(429, "slow down", {"Retry-After": "7"}) if n < 2 else None
    )
    assert waits == [7, 7]
    assert (server.requests, endpoint.usage.retries) == (3, 2)


def test_429_for_ever():
    line, requests, error = fails(lambda *_: failure(429, "quota", {"retry-after-ms": "1"}))
    assert (line, requests, error.fatal) == ("429: quota", 3, False)


def test_429_beyond_reason_is_not_waited_for():
    line, requests, _ = fails(lambda *_: failure(429, "come tomorrow", {"Retry-After": "86400"}))
    assert (line, requests) == ("429: come tomorrow", 1)


def test_500_then_an_answer():
    answer, endpoint, server = asked(lambda n, *_: failure(500) if n < 2 else None)
    assert answer.startswith("Explanation")
    assert (server.requests, endpoint.usage.retries) == (3, 2)


def test_500_for_ever():
    assert fails(lambda *_: failure(503, "loading"))[:2] == ("503: loading", 3)


def test_too_slow():
    def behave(number, body, server):
        server.released.wait(chat_endpoint.WAIT)

    line, requests, _ = fails(behave, timeout=0.1, retries=1)
    assert (line, requests) == ("no answer in 0.1 s, 2 times", 2)


def test_disconnect():
    line, requests, _ = fails(lambda *_: "disconnect")
    assert line.startswith("cannot be reached (")
    assert requests == 3


def test_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"cannot be reached \(.*\)$") as caught:
        ask(url)
    assert "\n" not in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_no_json(kind):
    answer = (200, {"Content-Type": kind}, b"<html>welcome to the proxy</html>")
    assert fails(lambda *_: answer)[:2] == ("the answer is not JSON", 1)


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": 3}']
)
def test_json_of_another_kind(content):
    answer = (200, {"Content-Type": "application/json"}, content)
    assert fails(lambda *_: answer)[0] == "the answer is no chat completion"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_use_in_going_on(status):
    """Some servers echo the key that they refuse."""
    line, requests, error = fails(lambda *_: failure(status, f"bad key {KEY}\nsecond line"))
    assert (line, requests, error.fatal) == (f"{status}: bad key [key] second line", 1, True)


def test_a_key_in_an_answer_is_masked():
    answer, *_ = asked(lambda *_: f"your key is {KEY}")
    assert answer == "your key is [key]"


def test_an_answer_that_was_cut():
    line, _, _ = fails(lambda *_: completion("Explanation: It", "length"), Refused)
    assert line == "the answer is longer than 512 tokens; raise --max-tokens"


def test_a_content_filter():
    line, _, _ = fails(lambda *_: completion("", "content_filter"), Refused)
    assert line == "the content filter stopped the answer"


def test_a_request_that_is_refused():
    line, requests, _ = fails(lambda *_: failure(400, "prompt too long"), Refused)
    assert (line, requests) == ("400: prompt too long", 1)


def test_a_model_without_our_settings():
    """Reasoning models take neither temperature nor max_tokens; found out once a run."""

    def behave(number, body, server):
        if "temperature" in body:
            return failure(400, "Unsupported value: 'temperature'", param="temperature")
        if "max_tokens" in body:
            return failure(
                400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            )
        return None

    _, endpoint, server = asked(behave)
    assert server.requests == 3
    assert endpoint.parameters == {"seed": 0, "max_completion_tokens": 512}


def test_usage_may_be_missing():
    _, endpoint, _ = asked(lambda *_: completion("x", usage=False))
    assert endpoint.usage.tokens_in == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "ftp://host/v1"},
        {"base_url": "host/v1"},
        {"base_url": "https://user:pass@host/v1"},
        {"base_url": "https://host/v1?key=1"},
        {"model": " "},
        {"model": "offline"},
        {"timeout": 0.0},
        {"timeout": float("nan")},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(InputError):
        Settings(**{"model": "m", **settings})


def test_who_sees_the_key():
    assert Settings("m", "http://example.com/v1").exposes_key
    for url in ("https://example.com/v1", "http://127.0.0.1:1/v1", "http://localhost/v1"):
        assert not Settings("m", url).exposes_key


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert key_from("SOME_KEY", DEFAULT_URL) == KEY
    monkeypatch.setenv("SOME_KEY", "")
    assert key_from("SOME_KEY", "http://127.0.0.1/v1") is None
    with pytest.raises(InputError, match="SOME_KEY is not set"):
        key_from("SOME_KEY", DEFAULT_URL)
    for bad in ("sk-gehe\u00efm", "sk-a b", "sk-\x01"):
        monkeypatch.setenv("SOME_KEY", bad)
        with pytest.raises(InputError) as caught:
            key_from("SOME_KEY", DEFAULT_URL)
        assert bad not in str(caught.value)


def test_json_nested_without_end():
    line, requests, _ = fails(lambda *_: (200, {}, b"[" * 200_000))
    assert line == "the answer is not JSON"
    assert requests == 1


@pytest.mark.parametrize("tokens", ["1e999", '"many"', "[1]", "-1e999", "NaN"])
def test_usage_may_be_nonsense(tokens):
    content = completion("a")[2].replace(
        b'"prompt_tokens": 100', f'"prompt_tokens": {tokens}'.encode()
    )
    assert tokens.encode() in content
    assert fails(lambda *_: (200, {}, content))[0] == "the answer is no chat completion"


def test_an_answer_without_end_is_not_read_to_its_end():
    huge = completion("a " * MAX_ANSWER_BYTES)
    line, _, _ = fails(lambda *_: huge, retries=0)
    assert line == f"the answer is larger than {MAX_ANSWER_BYTES} bytes"
