"""`penstock-worker`: start, load, serve, drain.

Health answers from the first moment on, so that whoever watches sees how far the start is. The
control server binds when the weights are there: who can connect can work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from penstock_runtime.cuda_device import find_device
from penstock_runtime.engine.compute import Compute, leave_cores_to_compute
from penstock_runtime.engine.streams import streams_of
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.model.errors import WeightsError
from penstock_runtime.transfer import rdma
from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.worker.build import Builder
from penstock_runtime.worker.http import Health, create_app, serving
from penstock_runtime.worker.metrics import WorkerCollector
from penstock_runtime.worker.prefill import PrefillWorker
from penstock_runtime.worker.settings import WorkerSettings, parse
from penstock_wire.garbage import keep_what_is_there
from penstock_wire.keys import InvalidKeys
from penstock_wire.model_source import ModelSourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock_runtime.engine.timeline import Trace
    from penstock_runtime.worker.decode import DecodeWorker
    from penstock_runtime.worker.rank_group import Place

log = logging.getLogger("penstock.worker")


class Process:
    """One worker process, from its settings to its end.

    Args:
        settings: the command line.
        places: of its ranks, see `RankGroup`.
    """

    def __init__(self, settings: WorkerSettings, places: Sequence[Place] = ()) -> None:
        self._settings = settings
        self._places = places
        self._health = Health()
        self._worker: PrefillWorker | DecodeWorker | None = None
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        leave_cores_to_compute()
        self._compute = Compute(
            max(1, settings.threads // settings.tensor_parallel),
            streams_of(find_device(settings.device)),
        )
        self._transport = _transport(settings)
        self._transfer = NixlTransfer(
            NixlSettings(
                transports=rdma.ucx_transports(
                    rdma=self._transport == rdma.RDMA, device=settings.device
                ),
                devices=settings.net_device,
            )
        )

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_failure)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        registry = CollectorRegistry()
        registry.register(WorkerCollector(self._settings, self._describe))
        app = create_app(self._health, registry, self._describe, self._timeline)
        async with serving(app, self._settings.http):
            try:
                await self._serve()
            finally:
                self._compute.close()
        return 1 if self._failure is not None else 0

    async def _serve(self) -> None:
        start = asyncio.create_task(self._start())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return
        worker = start.result()
        keep_what_is_there()
        self._health.state, self._health.progress, self._health.message = "ready", 1.0, ""
        worker.changed()
        log.info("%s is ready", self._settings.name)
        await stop
        if self._failure is None:
            self._health.state = "draining"
            log.info("%s drains", self._settings.name)
            await worker.drain(self._settings.drain_seconds)
        await worker.close()
        await self._transfer.close()

    def _describe(self) -> Mapping[str, object]:
        described: dict[str, object] = {
            "name": self._settings.name,
            "state": self._health.state,
            "busy_seconds": self._compute.busy_seconds,
            "transport": self._transport,
        }
        return described | (dict(self._worker.describe()) if self._worker is not None else {})

    def _timeline(self) -> Trace | None:
        return (
            self._worker.stage.timeline.trace() if isinstance(self._worker, PrefillWorker) else None
        )

    def _on_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A part that failed would leave a worker that looks alive: end it, it is started anew.
        loop.default_exception_handler(context)
        if isinstance(error := context.get("exception"), BaseException):
            self._failure = error
            self._stop.set()

    async def _start(self) -> PrefillWorker | DecodeWorker:
        builder = Builder(self._settings, self._health, self._compute, self._transfer, self._places)
        self._worker = await builder.build()
        await self._worker.start()
        return self._worker


def _transport(settings: WorkerSettings) -> str:
    """Return what KV and activations will travel over, and log why it is not what was asked."""
    if not settings.rdma:
        return rdma.TCP
    reason = rdma.missing()
    if reason:
        log.warning("RDMA is asked for and cannot be used, KV travels over TCP: %s", reason)
    return rdma.TCP if reason else rdma.RDMA


def main() -> None:
    """Run the command line.

    Exits with EX_NOINPUT (66) if there is no such model or its weights cannot be read, EX_CONFIG
    (78) if a setting or the model cannot be served, 1 or 2 otherwise: whoever restarts it can tell
    a crash from a mistake.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    try:
        settings = parse()
        sys.exit(asyncio.run(Process(settings).run()))
    except (ConfigurationError, InvalidKeys, ModelSourceError, OSError) as error:
        # Last line of the log: whoever shows a crash shows this.
        print(f"penstock-worker: {error}", file=sys.stderr)
        sys.exit(_exit_status(error))


def _exit_status(error: Exception) -> int:
    if isinstance(error, ModelSourceError | WeightsError):
        return os.EX_NOINPUT
    return 2 if isinstance(error, OSError) else os.EX_CONFIG


if __name__ == "__main__":
    main()
