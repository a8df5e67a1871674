"""A whole service within the test's process: real sockets, real workers, a chosen data path."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from penstock_router import settings as router_settings
from penstock_router.discovery import FileDiscovery
from penstock_router.links import control_links
from penstock_router.main import Router
from penstock_router.served_model import load_served_model
from penstock_runtime.engine.compute import Compute
from penstock_runtime.worker.build import Builder
from penstock_runtime.worker.http import Health
from penstock_runtime.worker.settings import parse
from penstock_wire.keys import Keys
from penstock_wire.messages import Hello
from penstock_wire.names import Resolver, new_boot_id
from penstock_wire.sockets import LinkSettings
from tests.integration.system.checkpoint import ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from penstock_runtime.kvcache.pool import PagePool
    from penstock_runtime.transfer.base import Transfer
    from penstock_runtime.worker.decode import DecodeWorker
    from penstock_runtime.worker.prefill import PrefillWorker


@dataclass(kw_only=True)
class Shape:
    """What the service looks like."""

    stages: int = 2
    decodes: int = 1
    page_size: int = 16
    pages: int = 256
    chunk: int = 256
    chunk_mode: str = "adaptive"
    local_tokens: int = 8
    max_batch: int = 16
    layers: str = ""
    """Of each stage; empty: as even as possible."""
    prefill_ranks: int = 1
    decode_ranks: int = 1


@dataclass(frozen=True)
class Answer:
    """A completion."""

    tokens: tuple[int, ...]
    cached: int


KV_HEADS = 2
TOKEN_BYTES = 4 * 2 * KV_HEADS * 16 * 4
"""KV of one token, all layers of `checkpoint.make`'s model, float32."""


class Service:
    """A running service: its workers, its router's client."""

    def __init__(self, shape: Shape, client: httpx.AsyncClient) -> None:
        self.shape = shape
        self.client = client
        self.decodes: list[DecodeWorker] = []
        self.stages: list[PrefillWorker] = []

    async def ready(self) -> None:
        """Return when a request would succeed. The test's own timeout is the deadline."""
        await eventually(self._is_ready, "the service to be ready")

    async def _is_ready(self) -> bool:
        return (await self.client.get("/ready")).status_code == 200

    async def complete(self, prompt: tuple[int, ...], count: int, **fields: object) -> Answer:
        """Return the output's tokens and how many prompt tokens were cached."""
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": count, "temperature": 0}
        response = await self.client.post("/v1/completions", json=body | fields, timeout=50)
        assert response.status_code == 200, response.text
        answer = response.json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(ids(answer["choices"][0]["text"]), cached)

    async def settled(self) -> None:
        """Return when nothing is granted, quarantined, or held; check every page then."""
        await eventually(self._is_quiet, "every page to be free or cached")
        for worker in self.decodes:
            worker.engine.ledger.check()
        for pool in self._pools():
            pool.check()

    async def _is_quiet(self) -> bool:
        counts = [pool.counts() for pool in self._pools()]
        return not any(c.granted + c.quarantined + c.resident for c in counts)

    def _pools(self) -> list[PagePool]:
        pools = [worker.engine.pool for worker in self.decodes]
        return pools + [s.leader.pool for s in self.stages if s.leader is not None]


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return when a condition over several objects holds; no single event announces it."""
    deadline = asyncio.get_running_loop().time() + 30
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited 30 s for {what}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(
    model: Path, folder: Path, shape: Shape, transfer: Callable[[], Transfer]
) -> AsyncIterator[Service]:
    """Run a service of `shape` while the context lasts."""
    keys = Keys.generate()
    keys.save(folder / "keys")
    subnet = next(_SUBNETS)
    names = [f"p-{i}" for i in range(shape.stages)] + [f"d-{i}" for i in range(shape.decodes)]
    _write_endpoints(folder / "endpoints.json", shape, names, subnet)
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                _worker(model, folder, shape, name, subnet, i, transfer())
            )
            for i, name in enumerate(names)
        ]
        client = await stack.enter_async_context(_router(model, folder, keys, shape))
        service = Service(shape, client)
        service.stages = workers[: shape.stages]  # type: ignore[assignment]
        service.decodes = workers[shape.stages :]  # type: ignore[assignment]
        await service.ready()
        yield service


_SUBNETS = (f"127.{os.getpid() % 200 + 20}.{i}" for i in itertools.count(1))
"""Loopback networks of services, one after another; each worker has an address of its own."""


def _write_endpoints(path: Path, shape: Shape, names: list[str], subnet: str) -> None:
    endpoints = [
        {
            "name": name,
            "role": "prefill" if i < shape.stages else "decode",
            "group": "g" if i < shape.stages else "",
            "stage": i if i < shape.stages else 0,
            "address": f"{subnet}.10{i}:7000",
            "revision": "r",
            "http": "127.0.0.1:1",
        }
        for i, name in enumerate(names)
    ]
    path.write_text(json.dumps({"endpoints": endpoints}))


@asynccontextmanager
async def _worker(
    model: Path,
    folder: Path,
    shape: Shape,
    name: str,
    subnet: str,
    index: int,
    transfer: Transfer,
) -> AsyncIterator[PrefillWorker | DecodeWorker]:
    arguments = [
        *("--name", name, "--model", f"file://{model}", "--keys", str(folder / "keys")),
        *("--bind", f"{subnet}.10{index}:7000", "--http", "127.0.0.1:1"),
        *("--dtype", "float32", "--page-size", str(shape.page_size)),
        *("--chunk-mode", shape.chunk_mode, "--max-chunk-tokens", str(shape.chunk)),
        *("--max-batch", str(shape.max_batch)),
    ]
    page_bytes = TOKEN_BYTES * shape.page_size
    prefill = index < shape.stages
    ranks = shape.prefill_ranks if prefill else shape.decode_ranks
    # A KV head that several ranks hold is there several times.
    page_bytes = page_bytes * max(ranks, KV_HEADS) // KV_HEADS
    arguments += ["--tensor-parallel", str(ranks)]
    if prefill:
        arguments += ["--role", "prefill", "--group", "g", "--stage", str(index)]
        arguments += ["--stages", str(shape.stages), "--peers", f"{subnet}.10{{i}}:7000"]
        arguments += ["--kv-memory", str(shape.pages * page_bytes // shape.stages)]
        if shape.layers:
            arguments += ["--layers-per-stage", shape.layers]
    else:
        arguments += ["--role", "decode", "--local-prefill-tokens", str(shape.local_tokens)]
        arguments += ["--kv-memory", str(shape.pages * page_bytes)]
    compute, health = Compute(1), Health()
    worker = await Builder(parse(arguments), health, compute, transfer).build()
    await worker.start()
    health.state = "ready"
    try:
        yield worker
    finally:
        await worker.close()
        await transfer.close()
        compute.close()


@asynccontextmanager
async def _router(
    model: Path, folder: Path, keys: Keys, shape: Shape
) -> AsyncIterator[httpx.AsyncClient]:
    prefill = "--require-prefill" if shape.stages else "--no-require-prefill"
    settings = router_settings.parse(
        [
            *("--model", f"file://{model}", "--served-model-name", "tiny", prefill),
            *("--discovery", f"file:{folder / 'endpoints.json'}", "--keys", str(folder / "keys")),
            *("--name", "router"),
        ]
    )
    hello = Hello(role="router", name="router", boot_id=new_boot_id())
    router = Router(
        settings,
        load_served_model(model, name="tiny", created=0),
        FileDiscovery(folder / "endpoints.json", interval=0.05),
        control_links(hello, keys, settings=LinkSettings(), resolver=Resolver()),
        hello=hello,
        keys=None,
        rng=random.Random(0),
    )
    transport = httpx.ASGITransport(router.app)
    async with (
        router.running(),
        httpx.AsyncClient(transport=transport, base_url="http://router") as client,
    ):
        yield client
