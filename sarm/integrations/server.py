"""`sarm serve`: rewards over HTTP, micro-batched across connections.

Endpoints: OpenRLHF's remote reward model (/ and /get_reward), vLLM's /classify and /pooling, our
/score and /explain, /v1/models, /health and /metrics. Tokenising runs in one thread, scoring in
another; the event loop only parses.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from sarm.errors import InputError, first_line

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    from sarm.integrations import contracts, limits
    from sarm.integrations.metrics import Metrics
except ImportError as error:
    raise InputError(f"sarm serve needs pip install 'sarm[serve]' ({error})") from error
from sarm.integrations.batching import TOKENS_PER_BATCH, MicroBatcher, RewardError, Worker
from sarm.integrations.inputs import Codec, Inputs
from sarm.integrations.limits import Disconnected, HttpError
from sarm.progress import stderr
from sarm.scorer import SARMScorer

POST_ROUTES: dict[str, type[contracts.Body]] = {
    "/": contracts.RewardBody,
    "/get_reward": contracts.RewardBody,
    "/classify": contracts.ClassifyBody,
    "/pooling": contracts.PoolingBody,
    "/score": contracts.ScoreBody,
    "/explain": contracts.ExplainBody,
}
GET_ROUTES = ("/health", "/metrics", "/v1/models", "/openapi.json")


@dataclass(frozen=True)
class ServeConfig:
    """Limits of a server.

    max_wait_ms: how long a request waits for company while the scorer is free.
    max_batch_tokens, max_batch_size: of one call of the scorer; None: by device.
    queue_limit: sequences accepted and not yet answered; more get 429.
    timeout_s: from a request's headers to its answer; later it gets 503.
    """

    max_wait_ms: float = 10.0
    max_batch_tokens: int | None = None
    max_batch_size: int = 512
    queue_limit: int = 4096
    max_body_mib: float = 16.0
    timeout_s: float = 150.0  # OpenRLHF's client gives up at 180

    def __post_init__(self) -> None:
        for name, low in (
            ("max_wait_ms", 0),
            ("max_batch_tokens", 1),
            ("max_batch_size", 1),
            ("queue_limit", 1),
            ("max_body_mib", 0.001),
            ("timeout_s", 0.001),
        ):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InputError(f"serve: {name} must be at least {low}, got {value}")


class Service:
    """One scorer behind an ASGI application (`app`).

    Args:
        load: makes the scorer; called in the scoring thread when the application starts.
        name: what /v1/models calls it; a request's `model` must be this, if it names one.
        token: bearer token that every endpoint but /health wants; None: open.
        on_failure: called if loading or the batching loop fails, after `failure` is set.
    """

    def __init__(
        self,
        load: Callable[[], SARMScorer],
        name: str,
        config: ServeConfig | None = None,
        *,
        token: str | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.config = config or ServeConfig()
        self.timeout_s = self.config.timeout_s
        self.failure: Exception | None = None
        self.accepted = self.answered = 0
        self.on_failure = on_failure
        self._load, self._token = load, token
        self._scorer: SARMScorer | None = None
        self._codec: Codec | None = None
        self._batcher: MicroBatcher | None = None
        self._admission = limits.Admission(self.config.queue_limit)
        self.metrics = Metrics()
        self.metrics.watch(
            lambda: self._batcher.waiting_rows if self._batcher else 0,
            lambda: self._admission.pending,
        )
        self.app = self._routes()

    # ---- life -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _life(self, app: FastAPI):
        self._scoring, self._preparing = Worker("sarm-score"), Worker("sarm-prepare")
        task = asyncio.create_task(self._start())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._scoring.stop()
            self._preparing.stop()

    async def _start(self) -> None:
        try:
            await self._load_and_score()
        except Exception as error:  # nothing can be scored any more: end, and say why
            self.failure = error
            self.on_failure()

    async def _load_and_score(self) -> None:
        scorer = await self._scoring.run(self._load)
        self.metrics.watch_cache(scorer.prefix_cache.stats)
        self._codec = await self._preparing.run(Codec, scorer)
        device = scorer.model.device.type
        self._batcher = MicroBatcher(
            lambda rows: scorer.score_token_ids(rows).tolist(),
            self._scoring,
            max_wait_s=self.config.max_wait_ms / 1e3,
            max_batch_tokens=self.config.max_batch_tokens or TOKENS_PER_BATCH.get(device, 8192),
            max_batch_size=self.config.max_batch_size,
            observe=self.metrics.batch,
        )
        self._scorer = scorer
        await self._batcher.run()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._scorer is not None

    # ---- routes ---------------------------------------------------------------------------

    def _routes(self) -> FastAPI:
        app = FastAPI(title="sarm", docs_url=None, redoc_url=None, lifespan=self._life)
        app.add_middleware(_Observe, service=self)
        for path, body in POST_ROUTES.items():
            schema = {"application/json": {"schema": body.model_json_schema()}}
            app.add_api_route(
                path,
                self._post(body),
                methods=["POST"],
                name=path.strip("/") or "get_reward",
                summary=(body.__doc__ or "").splitlines()[0],
                openapi_extra={"requestBody": {"content": schema, "required": True}},
            )
        for path, call in (
            ("/health", self._health),
            ("/metrics", self._show_metrics),
            ("/v1/models", self._models),
        ):
            app.add_api_route(path, call, methods=["GET"], name=path.split("/")[-1])
        app.add_exception_handler(HttpError, refuse)
        app.add_exception_handler(HTTPException, refuse)  # unknown path, wrong method
        return app

    async def _health(self) -> JSONResponse:
        """200 when requests can be scored."""
        if not self.ready:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ok", "model": self.name})

    async def _show_metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        limits.authorise(request, self._token)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> JSONResponse:
        """The one model, as OpenAI's API lists it."""
        limits.authorise(request, self._token)
        card: dict[str, str | int] = {"id": self.name, "object": "model", "owned_by": "sarm"}
        if self._codec is not None:
            card["max_model_len"] = self._codec.max_length
        return JSONResponse({"object": "list", "data": [card]})

    def _post(self, body: type[contracts.Body]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            deadline = time.monotonic() + self.config.timeout_s
            try:
                return JSONResponse(await self._answer(request, body, deadline))
            except Disconnected:
                return Response(status_code=499)  # nobody reads it; the metrics do
            except HttpError:
                with contextlib.suppress(Disconnected, asyncio.TimeoutError):
                    left = deadline - time.monotonic()
                    await asyncio.wait_for(limits.discard_body(request), max(0.0, left))
                raise

        endpoint.__doc__ = body.__doc__
        return endpoint

    async def _answer(self, request: Request, model: type[contracts.Body], deadline: float) -> dict:
        limits.authorise(request, self._token)
        if not self.ready:
            raise HttpError(503, "the model is being loaded", retry_after=1)
        with self._admission.enter(1):
            left = deadline - time.monotonic()
            try:
                raw = await asyncio.wait_for(
                    limits.read_body(request, int(self.config.max_body_mib * 2**20)), left
                )
            except asyncio.TimeoutError:
                raise HttpError(408, "the body did not arrive within the time limit") from None
            body = limits.parse(raw, model)
            del raw
            self._check_model(getattr(body, "model", None))
            try:
                inputs = body.inputs()
            except InputError as error:
                raise HttpError(422, str(error)) from None
            if len(inputs.values) > self.config.queue_limit:
                raise HttpError(
                    413,
                    f"{inputs.field}: {len(inputs.values)} sequences, more than the queue "
                    f"takes ({self.config.queue_limit}); split the request",
                )
            with self._admission.enter(max(0, len(inputs.values) - 1)):
                work = asyncio.ensure_future(self._work(body, inputs))
                return await limits.within(deadline - time.monotonic(), work, request)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise HttpError(404, f"model: {name!r} is not served here; this is {self.name!r}")

    # ---- work -----------------------------------------------------------------------------

    async def _work(self, body: contracts.Body, inputs: Inputs) -> dict:
        codec, batcher, scorer = self._codec, self._batcher, self._scorer
        assert codec is not None
        assert batcher is not None
        assert scorer is not None
        try:
            encoded = await self._preparing.run(codec.encode, inputs, body.encoding())
        except InputError as error:
            raise HttpError(422, str(error)) from None
        try:
            if isinstance(body, contracts.ExplainBody):
                call = partial(scorer.explain, inputs.values[0], body.top)
                return body.answer(await batcher.alone(call), self.name)
            rewards = await batcher.score([e.ids for e in encoded])
        except RewardError as error:
            raise HttpError(500, f"{inputs.where(error.index)}: {error}") from None
        except InputError as error:
            raise HttpError(500, str(error)) from None
        lengths, dropped = [len(e.ids) for e in encoded], [e.dropped for e in encoded]
        return body.answer(contracts.Scored(rewards, lengths, dropped), self.name)


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's and vLLM's clients read it."""
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), error.headers
    else:
        assert isinstance(error, HttpError)
        status, message, headers = error.status, str(error), {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
    headers = dict(headers or {})
    if not getattr(request.state, "body_read", False):
        headers["Connection"] = "close"  # else uvicorn would wait for the rest, paused
    message = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


class _Observe:
    """Counts requests, statuses and latencies; turns a bug into a 500 without its traceback."""

    def __init__(self, app, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), None
        self._service.accepted += 1

        async def watched(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            stderr.print(traceback.format_exc(), markup=False)
            if status is not None:
                raise
            message = f"{type(error).__name__}: {first_line(error)}"
            await plain_500(message)(scope, receive, watched)
        finally:
            self._service.answered += status is not None
            path = scope["path"]
            route = path if path in POST_ROUTES or path in GET_ROUTES else "other"
            self._service.metrics.request(route, status or 499, time.perf_counter() - start)


def plain_500(message: str) -> JSONResponse:
    """A bug as one line of JSON."""
    message = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": {"message": message, "code": 500}}, 500)
