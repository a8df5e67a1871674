"""A worker's HTTP side: health, readiness, state and metrics. No client ever talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from penstock_runtime.engine.timeline import encode_trace
from penstock_wire.names import split_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from penstock_runtime.engine.timeline import Trace

WorkerState: TypeAlias = Literal["starting", "ready", "draining"]


@dataclass(slots=True)
class Health:
    """What a worker says of itself; the worker changes it, HTTP and heartbeats read it."""

    state: WorkerState = "starting"
    progress: float = 0.0
    """Share of the start that is done, 0 … 1."""
    message: str = ""


def create_app(
    health: Health,
    registry: CollectorRegistry,
    describe: Callable[[], Mapping[str, object]],
    timeline: Callable[[], Trace | None] = lambda: None,
) -> FastAPI:
    """Return the application.

    Args:
        health: for /healthz and /readyz.
        registry: for /metrics.
        describe: gives the JSON of /state: pages by state, requests.
        timeline: gives the recent steps of a pipeline's stage for /timeline; None where there is
            no pipeline.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"state": health.state}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        ready = health.state == "ready"
        body = {
            "ready": ready,
            "state": health.state,
            "progress": round(health.progress, 3),
            "message": health.message,
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    @app.get("/state")
    async def state() -> JSONResponse:
        return JSONResponse(dict(describe()))

    @app.get("/timeline")
    async def recent_steps() -> Response:
        trace = timeline()
        if trace is None:
            message = "this worker is no stage of a prefill pipeline, or has not started yet"
            return JSONResponse({"error": message}, status_code=404)
        return Response(encode_trace(trace), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Server(uvicorn.Server):
    """A server that leaves signals to the worker, and is told when to end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """Return when told to end. uvicorn's own asks ten times a second, and renews a Date."""
        await self._ending.wait()

    def end(self) -> None:
        """Close everything: nobody is answered any more."""
        self.should_exit = self.force_exit = True
        self._ending.set()


@contextlib.asynccontextmanager
async def serving(app: FastAPI, address: str) -> AsyncIterator[None]:
    """Serve the application on host:port while the context lasts. Raises OSError if it cannot."""
    host, port = split_address(address)
    try:
        listener = socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        raise OSError(f"cannot serve health and metrics on {address}: {error}") from error
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", date_header=False
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield
    finally:
        server.end()
        await task
        listener.close()
