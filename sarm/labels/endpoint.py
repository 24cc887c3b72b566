"""An OpenAI-compatible chat endpoint: bounded, retried, and silent about its key.

The official client retries connection errors, timeouts, 408, 409, 429 and 5xx with exponential
backoff and waits as long as Retry-After asks (up to two minutes). Everything that is left becomes
an `EndpointError` of one line.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from sarm.errors import InputError, first_line
from sarm.labels.prompts import Messages, clipped

try:
    import openai
except ImportError as error:
    raise InputError(
        f"labels by a language model need pip install 'sarm[label]' ({error}); "
        "--offline works without"
    ) from error

DEFAULT_URL = "https://api.openai.com/v1"
#: The client's own bound on Retry-After, seconds.
MAX_RETRY_AFTER = 120.0
#: Bytes of an answer that are read: thoughts of 100,000 tokens fit, a stream without end does not.
MAX_ANSWER_BYTES = 4 * 2**20
#: Settings that some models refuse; they are left out when an endpoint says so.
OPTIONAL = ("temperature", "seed", "max_tokens")


class EndpointError(RuntimeError):
    """No answer, in one line.  fatal: no later request can fare better."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class Refused(EndpointError):
    """The endpoint will not answer this one request (400, 413, 422, a content filter)."""


@dataclass
class Usage:
    """What a run cost: as told by the endpoint, or as estimated where it tells nothing."""

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class Settings:
    """How an endpoint is asked.

    base_url: up to and with "/v1".  concurrency: requests under way at once, at most.  timeout:
    seconds for one try.  retries: further tries.  max_tokens: of an answer.
    """

    model: str
    base_url: str = DEFAULT_URL
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"--base-url must be http(s)://HOST..., got {self.base_url!r}")
        if url.username or url.password or url.query:
            raise InputError("--base-url must not hold a user, password or query; use --key-env")
        if not self.model.strip() or self.model == "offline":
            raise InputError(f"--model must name a model of the endpoint, got {self.model!r}")
        if self.concurrency < 1 or self.retries < 0 or self.max_tokens < 1 or not self.timeout > 0:
            raise InputError("--concurrency, --max-tokens and --timeout must be positive")

    @property
    def exposes_key(self) -> bool:
        """Whether the key would cross a network unencrypted."""
        url = urlsplit(self.base_url)
        host = url.hostname or ""
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        return url.scheme == "http" and not local


def key_from(name: str, base_url: str) -> str | None:
    """The key in the environment variable `name`; None for a server that may need none.

    Raises:
        InputError: not set though the default endpoint is asked, or no key at all by its form.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        if base_url == DEFAULT_URL:
            raise InputError(f"--key-env: the environment variable {name} is not set")
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:  # never quoted in an error
        raise InputError(f"--key-env: {name} holds characters that no key has")
    return key


class Endpoint:
    """A model behind an endpoint; use as `async with`.

    Args:
        key: never stored elsewhere; replaced in every text that comes back.
    """

    def __init__(self, settings: Settings, key: str | None = None) -> None:
        self.settings = settings
        self.usage = Usage()
        self.parameters: dict[str, Any] = {
            "temperature": 0,
            "seed": settings.seed,
            "max_tokens": settings.max_tokens,
        }
        self._key = key
        self._free = asyncio.Semaphore(settings.concurrency)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=settings.retries,
            default_headers={"Accept-Encoding": "identity"},  # or its size would be of the zipped
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._bound]}),
        )

    async def _bound(self, response: Any) -> None:
        """Lets an answer be read up to MAX_ANSWER_BYTES."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise EndpointError(f"{self._where}: the answer is compressed, which was not asked for")
        response.stream = _bounded(
            response.stream,
            EndpointError(f"{self._where}: the answer is larger than {MAX_ANSWER_BYTES} bytes"),
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def ask(self, messages: Messages) -> str:
        """The answer to a chat.

        Raises:
            Refused: this request is not answered.  EndpointError: the endpoint does not answer.
        """
        async with self._free:
            while True:
                sent = dict(self.parameters)
                try:
                    return await self._once(messages, sent)
                except openai.BadRequestError as error:
                    if not self._adapted(error, sent):
                        raise Refused(self._line(error)) from None
                except openai.OpenAIError as error:
                    raise self._fault(error) from None

    async def _once(self, messages: Messages, parameters: dict[str, Any]) -> str:
        tried = self.settings.retries + 1
        # a server that sends a byte now and then never runs into the timeout of a single read
        limit = tried * self.settings.timeout + self.settings.retries * MAX_RETRY_AFTER
        asked = self._client.chat.completions.with_raw_response.create(
            model=self.settings.model,
            messages=messages,  # type: ignore[arg-type]
            **parameters,
        )
        try:
            raw = await asyncio.wait_for(asked, limit)
        except asyncio.TimeoutError:
            raise EndpointError(f"{self._where}: no whole answer within {limit:.0f} s") from None
        self.usage.requests += 1
        self.usage.retries += raw.retries_taken
        try:
            body = raw.http_response.json()
        except (ValueError, RecursionError):
            raise EndpointError(f"{self._where}: the answer is not JSON") from None
        return self._content(body)

    def _content(self, body: Any) -> str:
        try:
            choice = body["choices"][0]
            content = choice["message"].get("content")
            told = body.get("usage") or {}
            self.usage.tokens_in += int(told.get("prompt_tokens") or 0)
            self.usage.tokens_out += int(told.get("completion_tokens") or 0)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            raise EndpointError(f"{self._where}: the answer is no chat completion") from None
        reason = choice.get("finish_reason")
        if reason == "content_filter":
            raise Refused(f"{self._where}: the content filter stopped the answer")
        if reason == "length":
            raise Refused(
                f"{self._where}: the answer is longer than {self.settings.max_tokens} tokens; "
                "raise --max-tokens"
            )
        return self._safe(content) if isinstance(content, str) else ""

    # ---- errors ----------------------------------------------------------------------------

    def _adapted(self, error: openai.BadRequestError, sent: dict[str, Any]) -> bool:
        """Whether an optional setting of the request was refused; it is left out from now on."""
        told = error.message.lower()
        for name in OPTIONAL:
            if name in sent and (error.param == name or (name in told and "support" in told)):
                value = self.parameters.pop(name, None)  # a request beside this one may have
                if name == "max_tokens" and value and "max_completion_tokens" in told:
                    self.parameters["max_completion_tokens"] = value
                return True
        return False

    def _fault(self, error: openai.OpenAIError) -> EndpointError:
        where, retries = self._where, self.settings.retries
        if isinstance(error, openai.APITimeoutError):
            line = f"{where}: no answer in {self.settings.timeout:g} s, {retries + 1} times"
            return EndpointError(line)
        if isinstance(error.__cause__, EndpointError):  # of `_bound`
            return error.__cause__
        if isinstance(error, openai.APIConnectionError):
            why = first_line(error.__cause__ or error)
            return EndpointError(f"{where}: cannot be reached ({self._safe(why)})")
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in (413, 422):
                return Refused(self._line(error))
            return EndpointError(self._line(error), fatal=status in (401, 403, 404, 405))
        return EndpointError(f"{where}: {self._safe(first_line(error))}")

    def _line(self, error: openai.APIStatusError) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        said = self._safe(message if isinstance(message, str) else error.message)
        return f"{self._where}: {error.status_code}: {clipped(said, 200)}"

    @property
    def _where(self) -> str:
        return self.settings.base_url

    def _safe(self, text: str) -> str:
        """Without the key, which an error page may echo."""
        return text.replace(self._key, "[key]") if self._key else text

    def __repr__(self) -> str:
        return f"Endpoint({self.settings.model!r} at {self.settings.base_url!r})"


def _bounded(stream: Any, problem: EndpointError) -> Any:
    """The stream of a body, that raises `problem` beyond MAX_ANSWER_BYTES.

    The client's HTTP library (httpx, or its successor) takes only streams of its own class.
    """

    class Bounded(type(stream)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        async def __aiter__(self):
            size = 0
            async for part in stream:
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise problem
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
