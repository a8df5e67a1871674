"""The HTTP API: paths to services, errors to OpenAI's shape. No decision is made here."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from penstock_router.errors import ApiError, InternalError, InvalidRequest, NotFound
from penstock_router.http import (
    BearerAuth,
    Disconnected,
    EventStream,
    error_response,
    read_body,
    until_disconnect,
)
from penstock_router.openai import prompts
from penstock_router.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_router.auth import KeyFile
    from penstock_router.metrics import Metrics
    from penstock_router.openai.service import Answer, CompletionService
    from penstock_router.proxy import Proxy
    from penstock_router.readiness import Readiness
    from penstock_router.workers import Fleet

log = logging.getLogger(__name__)

_Prepare: TypeAlias = "Callable[[bytes, float], Awaitable[tuple[Answer, bool]]]"


class Api:
    """The handlers, with what they need.

    Args:
        service: makes answers.
        fleet, proxy, readiness, metrics: what is reported.
        max_body_bytes: largest request body.
        keepalive: seconds of silence before a stream gets a comment.
    """

    def __init__(
        self,
        service: CompletionService,
        *,
        fleet: Fleet,
        proxy: Proxy,
        readiness: Readiness,
        metrics: Metrics,
        max_body_bytes: int,
        keepalive: float,
    ) -> None:
        self._service = service
        self._fleet = fleet
        self._proxy = proxy
        self._readiness = readiness
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._keepalive = keepalive

    # --- completions --------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""

        async def prepare(body: bytes, arrived: float) -> tuple[Answer, bool]:
            parsed = parse_body(body, ChatRequest)
            return await self._service.chat(parsed, arrived), parsed.stream

        return await self._complete("chat", request, prepare)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""

        async def prepare(body: bytes, arrived: float) -> tuple[Answer, bool]:
            parsed = parse_body(body, CompletionRequest)
            return await self._service.completion(parsed, arrived), parsed.stream

        return await self._complete("completions", request, prepare)

    async def _complete(self, endpoint: str, request: Request, prepare: _Prepare) -> Response:
        arrived = time.monotonic()

        def ended(outcome: str) -> None:
            self._metrics.requests.labels(endpoint, outcome).inc()
            self._metrics.e2e.observe(time.monotonic() - arrived)

        try:
            body = await read_body(request, self._max_body_bytes)
            answer, stream = await prepare(body, time.monotonic())
            if stream:
                return EventStream(answer.events(), keepalive=self._keepalive, on_end=ended)
            whole = await until_disconnect(request.receive, answer.whole())
        except ApiError as error:
            ended(str(error.status))
            raise
        except Disconnected:
            ended("cancelled")
            return Response(status_code=499)  # nobody reads it; the customary status in logs
        except BaseException:
            ended("500")
            raise
        ended("200")
        return Response(whole, media_type="application/json")

    # --- the model ----------------------------------------------------------------------------

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        self._service.check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "penstock",
            "max_model_len": self._service.context_limit,
        }

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        parsed = parse_body(await read_body(request, self._max_body_bytes), TokenizeRequest)
        self._service.check_model(parsed.model)
        model = self._service.model
        if (parsed.prompt is None) == (parsed.messages is None):
            raise InvalidRequest(
                "give either 'prompt' or 'messages'", param="prompt", code="invalid_value"
            )
        if parsed.messages is not None:
            text = prompts.render_chat(model, parsed.messages, parsed.chat_template_kwargs)
            ids = await prompts.encode(model, text, add_special_tokens=False)
        else:
            ids = await prompts.encode(
                model, parsed.prompt or "", add_special_tokens=parsed.add_special_tokens
            )
        limit = self._service.context_limit
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        parsed = parse_body(await read_body(request, self._max_body_bytes), DetokenizeRequest)
        self._service.check_model(parsed.model)
        model = self._service.model
        prompts.check_ids(model, parsed.tokens, "tokens")
        text = model.tokenizer.decode(parsed.tokens, skip_special_tokens=parsed.skip_special_tokens)
        return JSONResponse({"prompt": text})

    # --- operation ----------------------------------------------------------------------------

    async def health(self) -> Response:
        """GET /health: the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: a request would succeed from end to end."""
        reasons = self._readiness.reasons()
        body = {
            "ready": not reasons,
            "reasons": reasons,
            "message": "; ".join(reasons) or self._readiness.message(),
            "idle_seconds": round(self._proxy.idle_seconds(), 3),
            "waking": self._readiness.waking(),
        }
        return JSONResponse(body, status_code=503 if reasons else 200)

    async def accepting(self) -> Response:
        """GET /accepting: a request is served, or held until it can be."""
        accepting = self._readiness.accepting()
        return JSONResponse({"accepting": accepting}, status_code=200 if accepting else 503)

    async def metrics(self) -> Response:
        """GET /metrics, for Prometheus."""
        text = self._metrics.render(
            self._fleet,
            waiting=self._proxy.waiting,
            running=self._proxy.running,
            ready=not self._readiness.reasons(),
        )
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def build_app(api: Api, keys: KeyFile | None) -> FastAPI:
    """Return the ASGI application. `keys`: None leaves the API open."""
    app = FastAPI(title="Penstock", docs_url=None, redoc_url=None, openapi_url=None)
    routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.completion),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.one_model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
        ("GET", "/accepting", api.accepting),
        ("GET", "/metrics", api.metrics),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    if keys is not None:
        app.add_middleware(BearerAuth, keys=keys)
    return app


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Give the framework's own errors (unknown path, wrong method) OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        shaped: ApiError = NotFound(f"there is no {where}", code="unknown_url")
    else:
        shaped = InvalidRequest(
            f"{where}: {error.detail}", code="http_error", status=error.status_code
        )
    response = error_response(shaped)
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(InternalError("the router failed; see its log", code="internal"))
