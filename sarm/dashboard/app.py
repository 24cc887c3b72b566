"""The page over HTTP: its files, its API, and what keeps other sites and hosts out.

The files hold no secret and are open; everything under /api wants the bearer token, if one is set.
A page of another site may make a browser send requests here, and a name of another site may be
made to resolve to this machine (DNS rebinding): foreign `Host` and `Origin` headers are refused,
and a POST must declare JSON, which no form can.
"""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import Any, Literal

from sarm.errors import InputError, first_line

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException

    from sarm.integrations import limits
    from sarm.integrations.server import plain_500, refuse
except ImportError as error:
    raise InputError(f"sarm dashboard needs pip install 'sarm[serve]' ({error})") from error
from sarm.dashboard.views import PAGE, Views
from sarm.integrations.limits import Disconnected, HttpError
from sarm.progress import stderr

MAX_BODY = 2**20
#: Passes of the backbone that may wait for each other; more get 429.
MAX_SCORING = 8
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
#: Tells a browser to ask for the first answers at once.
PRELOAD = "</api/start>; rel=preload; as=fetch; crossorigin=anonymous"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a new version of the package is a new page
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def answer(self, views: Views) -> dict[str, Any]:
        raise NotImplementedError


class ScoreBody(_Body):
    """Responses to one prompt."""

    prompt: str = Field(min_length=1)
    responses: list[str] = Field(min_length=1, max_length=8)

    def answer(self, views: Views) -> dict[str, Any]:
        """Rewards and features."""
        return views.score(self.prompt, self.responses)


class TraceBody(_Body):
    """One response, token by token."""

    prompt: str = Field(min_length=1)
    response: str
    reading: Literal["ended", "read"] = "ended"
    top: int = Field(24, ge=1, le=64)

    def answer(self, views: Views) -> dict[str, Any]:
        """Tokens, rewards and activations."""
        return views.trace(self.prompt, self.response, self.reading, self.top)


class ShiftBody(_Body):
    """A profile, and the set that it is tried on."""

    profile: dict[str, Any]
    set: int = 0

    def answer(self, views: Views) -> dict[str, Any]:
        """Histogram, means and accuracies."""
        return views.shift(self.profile, self.set)


class YamlBody(_Body):
    """A profile to be downloaded."""

    profile: dict[str, Any]

    def answer(self, views: Views) -> dict[str, Any]:
        """Its file."""
        return views.yaml(self.profile)


class SaveBody(_Body):
    """A profile to be saved."""

    profile: dict[str, Any]
    overwrite: bool = False

    def answer(self, views: Views) -> dict[str, Any]:
        """Its file's name."""
        return views.save(self.profile, self.overwrite)


POSTS: dict[str, type[_Body]] = {
    "/api/score": ScoreBody,
    "/api/trace": TraceBody,
    "/api/shift": ShiftBody,
    "/api/yaml": YamlBody,
    "/api/profiles": SaveBody,
}
SCORING = ("/api/score", "/api/trace")


class Dashboard:
    """The ASGI application (`app`) of one `Views`, with what `integrations.process.serve` asks.

    Args:
        token: bearer token that the API wants; None: open.
        hosts: names, beside those of the loopback, by which the page may be called.
    """

    timeout_s = 60.0

    def __init__(self, views: Views, *, token: str | None = None, hosts: Iterable[str] = ()):
        self.views, self.name = views, views.name
        self.failure: Exception | None = None
        self.accepted = self.answered = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._token = token
        self.hosts = frozenset(host.lower().strip("[]") for host in (*LOOPBACK, *hosts))
        self._scoring = limits.Admission(MAX_SCORING)
        self.app = self._routes()

    def _routes(self) -> FastAPI:
        app = FastAPI(title="sarm dashboard", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(_Guard, dashboard=self)
        for path, content, kind in _assets():
            # the answer that the page waits for is asked for before its scripts have arrived; with
            # a token the browser could not, for it sends none by itself
            headers = {"Link": PRELOAD} if path == "/" and self._token is None else {}
            app.add_route(path, _asset(content, kind, headers), methods=["GET"])
        for path, call in (
            ("/api/start", self._start),
            ("/api/about", self._about),
            ("/api/features", self._features),
            ("/api/features/{id}", self._feature),
            ("/api/profiles", self._profiles),
            ("/api/profiles/{name}", self._load),
        ):
            app.add_api_route(path, call, methods=["GET"])
        for path, body in POSTS.items():
            app.add_api_route(path, self._post(path, body), methods=["POST"], name=path)
        app.add_exception_handler(HttpError, refuse)
        app.add_exception_handler(HTTPException, refuse)
        return app

    async def _start(self, request: Request) -> Response:
        return await self._answer(request, self.views.start)

    async def _about(self, request: Request) -> Response:
        return await self._answer(request, self.views.about)

    async def _features(self, request: Request) -> Response:
        ask = request.query_params
        query, order = ask.get("q", "")[:200], ask.get("order", "weight")
        offset, limit = _whole(ask, "offset", 0), _whole(ask, "limit", 50, PAGE)
        return await self._answer(request, self.views.features, query, order, offset, limit)

    async def _feature(self, request: Request) -> Response:
        return await self._answer(request, self.views.feature, _whole(request.path_params, "id", 0))

    async def _profiles(self, request: Request) -> Response:
        return await self._answer(request, self.views.profiles)

    async def _load(self, request: Request) -> Response:
        return await self._answer(request, self.views.load, request.path_params["name"])

    def _post(self, path: str, body: type[_Body]):
        async def endpoint(request: Request) -> Response:
            try:
                found = await self._body(request, body)
            except HttpError:
                with contextlib.suppress(Disconnected):
                    await limits.discard_body(request)  # or the client finds a reset, no answer
                raise
            with self._scoring.enter(path in SCORING):
                return await self._answer(request, found.answer, self.views)

        return endpoint

    async def _body(self, request: Request, body: type[_Body]) -> _Body:
        limits.authorise(request, self._token)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(415, f"content-type: expected application/json, got {kind!r}")
        return limits.parse(await limits.read_body(request, MAX_BODY), body)

    async def _answer(self, request: Request, call: Callable[..., dict], *args) -> Response:
        limits.authorise(request, self._token)
        try:
            return JSONResponse(await run_in_threadpool(call, *args))
        except InputError as error:
            raise HttpError(422, str(error)) from None
        except FileExistsError as error:
            raise HttpError(409, str(error)) from None
        except OSError as error:  # the profiles' folder: gone, full, not to be written
            raise HttpError(507, f"profiles: {error.strerror or error}") from None


class _Guard:
    """Refuses foreign hosts and origins, sets the headers of every answer, hides tracebacks."""

    def __init__(self, app, dashboard: Dashboard) -> None:
        self._app, self._dashboard = app, dashboard

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        self._dashboard.accepted += 1

        async def guarded(message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        request = Request(scope, receive)
        try:
            if problem := self._foreign(request):
                await (await refuse(request, problem))(scope, receive, guarded)
            else:
                await self._app(scope, receive, guarded)
        except Disconnected:
            pass
        except Exception as error:
            stderr.print(traceback.format_exc(), markup=False)
            if started:
                raise
            message = f"{type(error).__name__}: {first_line(error)}"
            await plain_500(message)(scope, receive, guarded)
        finally:
            self._dashboard.answered += started

    def _foreign(self, request: Request) -> HttpError | None:
        host = request.headers.get("host", "")
        if _name(host) not in self._dashboard.hosts:
            return HttpError(421, f"host: {host!r} is not this page's; see --allow-host")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return HttpError(403, f"origin: {origin!r} may not ask this page")
        return None


def _name(host: str) -> str:
    """A Host header without its port: "[::1]:8000" is "::1"."""
    host = host.lower().strip()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _whole(fields, name: str, default: int, most: int = 2**31) -> int:
    text = str(fields.get(name, default))
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > most:
        raise HttpError(422, f"{name}: expected a whole number up to {most}, got {text[:40]!r}")
    return int(text)


def _assets() -> Iterable[tuple[str, bytes, str]]:
    """(path, content, media type) of every file of the page, read once."""
    shared = resources.files("sarm.interpret").joinpath("strip.js")
    for file in (*resources.files("sarm.dashboard").joinpath("static").iterdir(), shared):
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            yield path, file.read_bytes(), kind


def _asset(content: bytes, kind: str, headers: Mapping[str, str]):
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    async def endpoint(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={**headers, "ETag": tag})
        return Response(content, media_type=kind, headers={**headers, "ETag": tag})

    return endpoint
