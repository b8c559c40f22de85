"""The server process: socket, model, web application, signals.

Knows FastAPI and uvicorn; the routes of a protocol are its own file's business.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llmopt_cli import __version__
from llmopt_cli.errors import LlmoptError, ServerError
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.metrics import CONTENT_TYPE
from llmopt_cli.server.openai import OpenAIApi
from llmopt_cli.server.service import Service, Settings
from llmopt_cli.server.streaming import ClientGoneError
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Recipe

CLIENT_CLOSED_REQUEST = 499  # nginx's word for an answer that nobody waits for
CLOSING_SECONDS = 1  # how long connections may take to close once their requests are done


def run(
    recipe: Recipe,
    settings: Settings,
    trust_remote_code: bool,
    announce: Callable[[dict[str, Any]], None],
    adapters: Mapping[str, str],
) -> None:
    """Serve until a signal. `announce` gets the engine's start-up report and the `url` when the model is loaded.

    LoRA `adapters` are folders by the names they are served under. The port is taken before the model is read:
    ServerError if that fails.
    """
    with _listen(settings.host, settings.port) as listener:
        # They bring torch: not before the port is known to be free.
        from llmopt_cli.runtime import AsyncEngine, Engine, SamplingParams
        from llmopt_cli.runtime.compression.door import refuse_unfit_policy

        if settings.kv_policy is not None:
            refuse_unfit_policy(settings.kv_policy, Checkpoint.open(recipe.model), recipe.batching)
        engine = Engine.from_recipe(recipe, trust_remote_code, adapters=adapters)
        engine.check([0], SamplingParams(kv_policy=settings.kv_policy))
        if settings.schedule_log:
            engine.record(settings.schedule_log)
        service = Service(AsyncEngine(engine), settings)
        policy = settings.kv_policy and str(settings.kv_policy)
        announce(engine.startup_report() | {"kv_policy": policy, "url": _url(listener)})
        Server(service).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        raise ServerError(
            f"cannot listen on {host} port {port}: {reason}", "choose another `--port`, or check `--host`"
        ) from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with a drain: the first signal stops admission and lets running requests finish, the second ends all.

    uvicorn alone would close its port at the first signal, so that nobody could see `/ready` turn to 503.
    """

    def __init__(self, service: Service) -> None:
        # No access log: it would go to stdout, a line a request.
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._service = service
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGINT and SIGTERM."""
        if self._service.draining:
            # The engine may be deep in a kernel, and nothing of ours is half-written: leave without waiting.
            os._exit(128 + sig)
        self._deadline = time.monotonic() + self._service.settings.shutdown_timeout
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to stop."""
        if self._service.draining:
            late = time.monotonic() > self._deadline
            if late:
                self._service.engine.stop()  # what still runs ends with an error that its client can read
            self.should_exit = late or not self._service.in_flight
        return await super().on_tick(counter)


def create_app(service: Service) -> FastAPI:
    """The web application around `service`, whose engine runs while the application does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.engine:
            yield

    app = FastAPI(title="llmopt", version=__version__, lifespan=lifespan)
    app.state.api_key = service.settings.api_key
    app.include_router(OpenAIApi(service).router)
    app.include_router(Probes(service).router)
    for kind in (ApiError, LlmoptError, RequestValidationError, HTTPException, ClientGoneError, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


class Probes:
    """What orchestrators and dashboards ask; open to all, as they carry no key."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        for endpoint in (self.health, self.ready, self.version, self.metrics):
            self.router.add_api_route(f"/{endpoint.__name__}", endpoint, methods=["GET"])

    async def health(self) -> Response:
        """503 when the process should be restarted."""
        return _verdict(self._service.unhealthy())

    async def ready(self) -> Response:
        """503 when no request should be sent here."""
        return _verdict(self._service.unready())

    async def version(self) -> Response:
        """The version of llmopt."""
        return JSONResponse({"version": __version__})

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(self._service.metrics.exposition(), media_type=CONTENT_TYPE)


def _verdict(reason: str | None) -> Response:
    if reason is not None:
        raise ApiError(503, reason)
    return JSONResponse({"status": "ok"})


async def _on_error(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's shape."""
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = _as_api_error(request, error)
    # ASCII, as the client's own words in it may hold what UTF-8 can't.
    return Response(json.dumps(answer.body()), answer.status, answer.headers, media_type="application/json")


def _as_api_error(request: Request, error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case LlmoptError():
            return ApiError.of(error)
        case RequestValidationError():
            return ApiError.of_validation(error.errors())
        case HTTPException():
            return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
