"""What a server refuses, and how: HTTP errors of one clear line, and the limits on a request."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from sarm.errors import first_line

Body = TypeVar("Body", bound=BaseModel)

#: A client may still be sending when it is refused; so much is read and thrown away, so that it
#: finds the answer instead of a connection reset.
DISCARD_BYTES = 64 * 2**20


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Disconnected(Exception):
    """The client went away: nobody to answer."""


def authorise(request: Request, token: str | None) -> None:
    """Refuse a request without the bearer token; in constant time, whatever was sent."""
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise HttpError(401, "wrong or missing bearer token")


class Admission:
    """Counts sequences accepted and not yet answered; refuses those beyond the limit at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending = 0

    @contextlib.contextmanager
    def enter(self, count: int) -> Iterator[None]:
        """Hold `count` places."""
        if self.pending + count > self.limit:
            raise HttpError(
                429, f"the queue is full ({self.pending} of {self.limit} sequences)", retry_after=1
            )
        self.pending += count
        try:
            yield
        finally:
            self.pending -= count


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes."""
    too_large = HttpError(413, f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in chunks(request):
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def discard_body(request: Request) -> None:
    """Read what a refused client is still sending, within bounds."""
    if "expect" in request.headers:  # it waits for our word before it sends
        return
    size = 0
    async for part in chunks(request):
        size += len(part)
        if size > DISCARD_BYTES:
            return


async def chunks(request: Request) -> AsyncIterator[bytes]:
    """Parts of the body that have not been read yet."""
    more = not getattr(request.state, "body_read", False)
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        more = message.get("more_body", False)
        request.state.body_read = not more
        yield message.get("body", b"")


async def disconnected(request: Request) -> None:
    """Return when the client has gone; for a request whose body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parse(body: bytes, model: type[Body]) -> Body:
    """The body as its model, or 400 for what is no JSON and 422 for what has the wrong shape."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"malformed JSON: {first_line(error)}") from None
    if not isinstance(fields, dict):
        raise HttpError(422, f"body: expected an object, got {type(fields).__name__}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise HttpError(422, f"{where}: {first['msg']}") from None


async def within(seconds: float, work: asyncio.Future, request: Request) -> Any:
    """The result of `work`; it is cancelled at the deadline or when the client goes away."""
    gone = asyncio.ensure_future(disconnected(request))
    try:
        done, _ = await asyncio.wait(
            {work, gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED
        )
        if work in done:
            return work.result()
        if gone in done:
            raise Disconnected
        raise HttpError(503, "not scored within the time limit; the work was dropped", 1)
    finally:
        gone.cancel()
        work.cancel()
