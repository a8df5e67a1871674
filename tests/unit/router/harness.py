"""A whole router in the test's event loop, on fake workers, behind a real HTTP server."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import uvicorn

from penstock_router.main import Router
from penstock_router.served_model import ServedModel, load_served_model
from penstock_router.settings import Settings
from penstock_wire.messages import Hello

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock_router.auth import KeyFile
    from penstock_router.scaling import Scales
    from tests.unit.router.fake_worker import FakeCluster

MODEL = "tiny"


@dataclass
class Service:
    """What a test talks to."""

    router: Router
    model: ServedModel
    base_url: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def until_ready(self, seconds: float = 10.0) -> None:
        """Wait until a request would succeed."""
        async with asyncio.timeout(seconds):
            while self.router.readiness.reasons():
                await self.router.fleet.changed(0.01)

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(path, json=body)


async def eventually(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what has no event to wait for."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.005)


def settings(**changes: Any) -> Settings:
    """Settings with short waits."""
    values: dict[str, Any] = {
        "model": "file:///nowhere",
        "served_model_name": MODEL,
        "discovery": "file:nowhere",
        "keys": Path("nowhere"),
        "worker_wait_seconds": 5.0,
        "keepalive_seconds": 5.0,
    }
    return Settings(**(values | changes))


@asynccontextmanager
async def serving(
    cluster: FakeCluster,
    checkpoint: Path,
    *,
    keys: KeyFile | None = None,
    scales: Scales | None = None,
    **changes: Any,
) -> AsyncIterator[Service]:
    """Serve on a loopback port for as long as the context is open."""
    model = load_served_model(checkpoint, name=MODEL, created=1)
    hello = Hello(role="router", name="router", boot_id="router-boot")
    router = Router(
        settings(**changes),
        model,
        cluster,
        cluster.connect,
        hello=hello,
        keys=keys,
        rng=random.Random(1),
        scales=scales,
    )
    # With the protocol named, as uvicorn has it: asyncio sets TCP_NODELAY on such sockets only.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        router.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    limits = httpx.Limits(max_connections=256)
    async with (
        router.running(),
        httpx.AsyncClient(base_url=base_url, timeout=20, limits=limits, trust_env=False) as http,
        openai.AsyncOpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client,
    ):
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await eventually(lambda: server.started)
            yield Service(router, model, base_url, http, client)
        finally:
            await http.aclose()
            await client.close()
            server.should_exit = True
            await task
