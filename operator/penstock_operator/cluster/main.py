"""The process `penstock-operator`: stands by, leads, and ends in order.

Every part that must not end alone is a task here; the first that ends, ends the process. That is
right for an operator: its successor reads everything again, and what it runs does not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp

from penstock_operator.cluster import logs
from penstock_operator.cluster.children import Children
from penstock_operator.cluster.connect import KubeTransport, configure
from penstock_operator.cluster.events import Events
from penstock_operator.cluster.executor import Executor
from penstock_operator.cluster.health import Health, serving
from penstock_operator.cluster.kube import Kube
from penstock_operator.cluster.lease import Elector
from penstock_operator.cluster.metrics import Metrics
from penstock_operator.cluster.polling import Poller
from penstock_operator.cluster.reconcile import Reconciler
from penstock_operator.cluster.resync import Resync
from penstock_operator.cluster.settings import Settings, identity, parse
from penstock_operator.cluster.watches import Watches
from penstock_operator.cluster.workqueue import WorkQueue
from penstock_operator.errors import PenstockError

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

Stop: TypeAlias = "asyncio.Future[None]"
_END_SECONDS = 10.0
"""How long the parts may take to end."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the operator until SIGTERM or SIGINT; exits with 0, or 1 after a failure."""
    try:
        settings = parse(arguments)
        logs.set_up(style=settings.log_format, level=settings.log_level)
        asyncio.run(run(settings))
    except PenstockError as error:
        logging.getLogger(__name__).critical("%s", error)
        if error.remedy:
            logging.getLogger(__name__).critical("%s", error.remedy)
        sys.exit(error.exit_code)


async def run(settings: Settings) -> None:
    """Run until a signal. Raises PenstockError for what ends it otherwise."""
    stop: Stop = asyncio.get_running_loop().create_future()
    _stop_on_signals(stop)
    name = identity()
    metrics = Metrics()
    configuration = await configure(settings.kubeconfig)
    async with contextlib.AsyncExitStack() as stack:
        transport = await stack.enter_async_context(KubeTransport(configuration, metrics))
        elector = Elector(
            transport,
            namespace=settings.own_namespace(),
            name=settings.lease_name,
            identity=name,
            duration=settings.lease_seconds,
            deadline=settings.renew_deadline_seconds,
            retry=settings.lease_retry_seconds,
        )
        metrics.follow(metrics.leader, lambda: float(elector.held))
        health = Health(elector)
        port = await stack.enter_async_context(serving(health, metrics, settings.http_address()))
        log.info("%s stands by; /healthz, /readyz and /metrics are at port %d", name, port)
        election = asyncio.create_task(elector.run(), name="lease")
        try:
            if await _first(stop, election, elector.acquired):
                log.info("%s leads", name)
                session = await stack.enter_async_context(aiohttp.ClientSession())
                parts = _assemble(settings, Kube(transport, elector), session, metrics, name)
                await _lead(parts, configuration, health, election, stop)
        finally:
            await _end([election])
            await elector.release()
    log.info("%s has ended", name)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What works while this process leads."""

    queue: WorkQueue
    watches: Watches
    resync: Resync


def _assemble(
    settings: Settings, kube: Kube, session: aiohttp.ClientSession, metrics: Metrics, name: str
) -> _Parts:
    children = Children()
    reconciler = Reconciler(
        kube,
        children,
        executor=Executor(kube, children),
        asker=Poller(session, seconds=settings.poll_seconds),
        events=Events(kube, identity=name, metrics=metrics),
    )
    queue = WorkQueue(
        reconciler, metrics, workers=settings.workers, limit=settings.reconcile_seconds
    )
    watches = Watches(kube, children, queue, namespaces=settings.namespaces)
    resync = Resync(
        kube,
        children,
        watches,
        queue,
        metrics,
        seconds=settings.resync_seconds,
        namespaces=settings.namespaces,
    )
    metrics.follow(metrics.services, lambda: len(watches.services))
    metrics.follow(metrics.children, children.count)
    return _Parts(queue, watches, resync)


async def _lead(
    parts: _Parts,
    configuration: Any,
    health: Health,
    election: asyncio.Task[None],
    stop: Stop,
) -> None:
    """Work until a signal. Raises what ends one of the parts.

    kopf cancels, when it ends, every task that began after it did: so ours begin before, and end
    before.
    """
    health.queue, health.comparison = parts.queue, parts.resync
    priming = asyncio.create_task(parts.watches.prime(), name="prime")
    if not await _first(stop, election, priming):
        await _end([priming])
        return
    health.primed = True
    working = asyncio.create_task(parts.queue.run(), name="queue")
    comparing = asyncio.create_task(parts.resync.run(), name="resync")
    await asyncio.sleep(0)  # their own tasks begin
    loop = asyncio.get_running_loop()
    ready, leave = loop.create_future(), loop.create_future()
    watching = asyncio.create_task(
        parts.watches.run(configuration, ready=ready, stop=leave), name="kopf"
    )
    try:
        if await _first(stop, election, working, comparing, watching, ready):
            _stop_on_signals(stop)  # kopf has put its own handlers in the place of ours
            await _first(stop, election, working, comparing, watching)
    finally:
        await _end([working, comparing])
        if not leave.done():
            leave.set_result(None)
        await _end([watching], patience=_END_SECONDS)


async def _first(stop: Stop, *others: asyncio.Future[None]) -> bool:
    """Wait for one of these to be done. Return False for `stop`. Raises what one ended with.

    No task is made for it: kopf would cancel that too when it ends.
    """
    done, _ = await asyncio.wait({stop, *others}, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        future.result()
    return stop not in done


async def _end(tasks: Sequence[asyncio.Task[None]], *, patience: float = 0.0) -> None:
    """Cancel tasks after `patience` seconds and wait for them. What they raise was told before."""
    if patience:
        await asyncio.wait(tasks, timeout=patience)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_END_SECONDS)


def _stop_on_signals(stop: Stop) -> None:
    def tell() -> None:
        if not stop.done():
            stop.set_result(None)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
