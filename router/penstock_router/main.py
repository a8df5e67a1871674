"""The router process: wires the parts together and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from penstock_router import settings as settings_module
from penstock_router.app import Api, build_app
from penstock_router.auth import KeyFile
from penstock_router.discovery import FileDiscovery
from penstock_router.errors import ConfigurationError, ModelUnusable
from penstock_router.kubernetes_api import KubernetesApi
from penstock_router.kubernetes_discovery import KubernetesDiscovery, PodSet
from penstock_router.links import control_links
from penstock_router.metrics import Metrics
from penstock_router.openai.service import CompletionService
from penstock_router.prefix_index import PrefixIndex
from penstock_router.proxy import Proxy
from penstock_router.readiness import Readiness
from penstock_router.scaling import RoleScalers
from penstock_router.served_model import FILES, ServedModel, load_served_model
from penstock_router.server import CloseWhenDraining, Server, listeners
from penstock_router.wake import Waker
from penstock_router.workers import Fleet
from penstock_wire.garbage import keep_what_is_there
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
    from penstock_router.scaling import Scales
    from penstock_router.settings import Settings

log = logging.getLogger(__name__)


class Router:
    """A router, wired: everything that lives as long as the process.

    Args:
        settings: of the process.
        model: what is served.
        discovery: where the workers are.
        connect: makes links to them.
        scales: where roles that sleep are woken; needed if `settings.wake` has one.
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
        scales: Scales | None = None,
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
        self.waker = Waker(
            self.fleet,
            scales,
            settings.scalers,
            self.metrics,
            seconds=settings.wake_seconds,
        )
        self.readiness = Readiness(self.fleet, self.waker, timeout=settings.canary_seconds)
        self.proxy = Proxy(
            self.fleet,
            self.waker,
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
                    group.create_task(self.waker.run(), name="waker"),
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
    rng = random.Random()  # noqa: S311 - breaks ties and spreads attempts, keeps no secret
    discovery, scales = _surroundings(settings, rng)
    router = Router(
        settings,
        model,
        discovery,
        control_links(
            hello, curve, settings=LinkSettings(), resolver=Resolver(settings.hosts_file)
        ),
        hello=hello,
        keys=keys,
        rng=rng,
        scales=scales,
    )
    config = uvicorn.Config(
        CloseWhenDraining(router.app, router.readiness),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",  # the API has no web sockets
        server_header=False,
        timeout_keep_alive=75,  # above the 60 s after which common load balancers drop a connection
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    keep_what_is_there()
    sockets = listeners(settings.host, settings.port, settings.fd)
    async with router.running():
        await Server(config, router.readiness, own=sockets[0]).serve(sockets=sockets)


def _surroundings(settings: Settings, rng: random.Random) -> tuple[Discovery, Scales | None]:
    """Return where workers are found, and where they are scaled. Raises ConfigurationError."""
    kind, _, rest = settings.discovery.partition(":")
    if kind == "file" and rest:
        path = Path(rest.removeprefix("//"))
        return FileDiscovery(path, interval=settings.discovery_seconds), None
    if kind != "kubernetes":
        raise ConfigurationError(
            f"--discovery {settings.discovery!r} is not known; write file:PATH or "
            "kubernetes:NAMESPACE/LABEL=VALUE"
        )
    if settings.kubernetes_api is None:
        raise ConfigurationError(
            "--discovery kubernetes:… outside a cluster needs --kubernetes-api URL"
        )
    pods = PodSet.parse(rest)
    api = KubernetesApi(settings.kubernetes_api, settings.kubernetes_credentials)
    return KubernetesDiscovery(api, pods, rng=rng), RoleScalers(api, pods.namespace)


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
    """Run `penstock-router`.

    If it cannot start it says why in a sentence, and exits with EX_NOINPUT (66) if the model is not
    there or not readable, EX_CONFIG (78) if a setting is refused.
    """
    try:
        settings = settings_module.parse(arguments)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        asyncio.run(serve(settings))
    except (ModelUnusable, ModelSourceError) as error:
        _give_up(error, os.EX_NOINPUT)
    except (ConfigurationError, InvalidKeys) as error:
        _give_up(error, os.EX_CONFIG)


def _give_up(error: Exception, status: int) -> NoReturn:
    print(f"penstock-router: {error}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
