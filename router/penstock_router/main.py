"""The router process: wires the parts together and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import uvicorn

from penstock_router import settings as settings_module
from penstock_router.app import Api, build_app
from penstock_router.auth import KeyFile
from penstock_router.discovery import open_discovery
from penstock_router.errors import ConfigurationError
from penstock_router.links import control_links
from penstock_router.metrics import Metrics
from penstock_router.openai.service import CompletionService
from penstock_router.prefix_index import PrefixIndex
from penstock_router.proxy import Proxy
from penstock_router.readiness import Readiness
from penstock_router.served_model import FILES, ServedModel, load_served_model
from penstock_router.server import CloseWhenDraining, Server, listeners
from penstock_router.workers import Fleet
from penstock_wire.keys import InvalidKeys, Keys
from penstock_wire.messages import Hello
from penstock_wire.model_source import ModelSourceError, resolve
from penstock_wire.names import Resolver, new_boot_id
from penstock_wire.sockets import LinkSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from fastapi import FastAPI

    from penstock_router.discovery import Discovery
    from penstock_router.links import LinkFactory
    from penstock_router.settings import Settings

log = logging.getLogger(__name__)


class Router:
    """A router, wired: everything that lives as long as the process.

    Args:
        settings: of the process.
        model: what is served.
        discovery: where the workers are.
        connect: makes links to them.
        hello: who the router is.
        keys: bearer keys; None leaves the API open.
        rng: breaks ties between workers.
    """

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        discovery: Discovery,
        connect: LinkFactory,
        *,
        hello: Hello,
        keys: KeyFile | None,
        rng: random.Random,
    ) -> None:
        self.metrics = Metrics()
        self.fleet = Fleet(
            discovery,
            connect,
            hello=hello,
            index=PrefixIndex(time.monotonic),
            rng=rng,
            require_prefill=settings.require_prefill,
            group_wait=settings.group_wait_seconds,
        )
        self.readiness = Readiness(self.fleet, timeout=settings.canary_seconds)
        self.proxy = Proxy(
            self.fleet,
            self.metrics,
            max_queue=settings.max_queue,
            max_attempts=settings.max_attempts,
            worker_wait=settings.worker_wait_seconds,
            stall=settings.stall_seconds,
        )
        api = Api(
            CompletionService(model, self.fleet, self.proxy, self.metrics),
            fleet=self.fleet,
            proxy=self.proxy,
            readiness=self.readiness,
            metrics=self.metrics,
            max_body_bytes=settings.max_body_bytes,
            keepalive=settings.keepalive_seconds,
        )
        self.app: FastAPI = build_app(api, keys)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the fleet and probe it for as long as the context is open.

        If either breaks, the body is cancelled: a router that is blind must not look alive.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.fleet.run(), name="fleet"),
                    group.create_task(self.readiness.run(), name="readiness"),
                ]
                yield
                for task in tasks:
                    task.cancel()
        finally:
            await self.fleet.close()


async def serve(settings: Settings) -> None:
    """Run the router until a signal.

    Raises:
        ConfigurationError, ModelSourceError, InvalidKeys: it cannot start.
    """
    keys = KeyFile(settings.api_key_file) if settings.api_key_file is not None else None
    curve = await asyncio.to_thread(Keys.load, settings.keys)
    model = await asyncio.to_thread(_load_model, settings)
    hello = Hello(
        role="router",
        name=settings.name,
        boot_id=new_boot_id(),
        revision=settings.revision,
    )
    router = Router(
        settings,
        model,
        open_discovery(settings.discovery, interval=settings.discovery_seconds),
        control_links(
            hello, curve, settings=LinkSettings(), resolver=Resolver(settings.hosts_file)
        ),
        hello=hello,
        keys=keys,
        rng=random.Random(),  # noqa: S311 - breaks ties, keeps no secret
    )
    config = uvicorn.Config(
        CloseWhenDraining(router.app, router.readiness),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,  # above the 60 s after which common load balancers drop a connection
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    sockets = listeners(settings.host, settings.port, settings.fd)
    async with router.running():
        await Server(config, router.readiness).serve(sockets=sockets)


def _load_model(settings: Settings) -> ServedModel:
    directory = resolve(
        settings.model,
        cache_dir=settings.cache_dir,
        token_file=settings.hf_token_file,
        endpoint=settings.hf_endpoint,
        allow_patterns=FILES,
    )
    return load_served_model(directory, name=settings.served_model_name, created=int(time.time()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `penstock-router`; exits with 1 and a sentence if it cannot start."""
    try:
        settings = settings_module.parse(arguments)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        asyncio.run(serve(settings))
    except (ConfigurationError, ModelSourceError, InvalidKeys) as error:
        sys.exit(f"penstock-router: {error}")


if __name__ == "__main__":
    main()
