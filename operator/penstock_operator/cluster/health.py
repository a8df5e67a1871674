"""/healthz, /readyz and /metrics."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from penstock_operator.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from penstock_operator.cluster.metrics import Metrics


class Leadership(Protocol):
    """What an elector knows."""

    @property
    def held(self) -> bool:
        """Whether this process leads now."""
        ...

    @property
    def answering(self) -> bool:
        """Whether the API has answered lately."""
        ...


class Queue(Protocol):
    """What a work queue knows."""

    @property
    def stuck(self) -> bool:
        """Whether a service has waited for longer than can be."""
        ...


class Comparison(Protocol):
    """What a resync knows."""

    @property
    def dead(self) -> Iterable[str]:
        """Resources whose watch tells nothing."""
        ...


@dataclass(slots=True)
class Health:
    """What is asked for the verdicts; the process adds what it has started."""

    leadership: Leadership
    queue: Queue | None = None
    comparison: Comparison | None = None
    primed: bool = False

    def sick(self) -> list[str]:
        """Return why the process should be started again."""
        dead = self.comparison.dead if self.comparison is not None else ()
        reasons = [f"the watch of {resource} is dead" for resource in sorted(dead)]
        if self.queue is not None and self.queue.stuck:
            reasons.append("a service has waited for its reconcile for too long")
        return reasons

    def not_ready(self) -> list[str]:
        """Return why the process neither leads nor could take over."""
        if not self.leadership.answering:
            return ["the API server has not answered lately"]
        if self.leadership.held and not self.primed:
            return ["the cluster has not been read yet"]
        return []


@contextlib.asynccontextmanager
async def serving(health: Health, metrics: Metrics, address: tuple[str, int]) -> AsyncIterator[int]:
    """Answer at `address` while the context lasts; give the port. Raises SettingsError."""

    async def healthz(_: web.Request) -> web.Response:
        reasons = health.sick()
        return web.json_response(
            {"healthy": not reasons, "reasons": reasons}, status=503 if reasons else 200
        )

    async def readyz(_: web.Request) -> web.Response:
        reasons = health.not_ready()
        body = {"ready": not reasons, "leader": health.leadership.held, "reasons": reasons}
        return web.json_response(body, status=503 if reasons else 200)

    async def numbers(_: web.Request) -> web.Response:
        return web.Response(
            body=metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", numbers)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        host, port = address
        site = web.TCPSite(runner, host or None, port)
        try:
            await site.start()
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host}:{port}: {error}", remedy="choose another --http HOST:PORT"
            ) from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
