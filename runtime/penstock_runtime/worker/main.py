"""`penstock-worker`: start, load, serve, drain.

Health answers from the first moment on, so that whoever watches sees how far the start is. The
control server binds when the weights are there: who can connect can work.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch
from prometheus_client import CollectorRegistry

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.kv_writer import KvWriter, StageIdentity
from penstock_runtime.engine.ring import ActivationRing
from penstock_runtime.engine.runner import DecodeRunner, StageRunner
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import DTYPES, ModelConfig
from penstock_runtime.model.transformer import Transformer
from penstock_runtime.model.weights import model_digest
from penstock_runtime.scheduler.admission import RemoteSettings
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings, split_layers
from penstock_runtime.scheduler.decode import DecodeSettings
from penstock_runtime.transfer.base import Region
from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.worker.decode import DecodeWorker
from penstock_runtime.worker.http import Health, create_app, serving
from penstock_runtime.worker.metrics import WorkerCollector
from penstock_runtime.worker.prefill import PrefillWorker
from penstock_runtime.worker.settings import WorkerSettings, parse
from penstock_wire import model_source
from penstock_wire.keys import InvalidKeys, Keys
from penstock_wire.messages import Hello
from penstock_wire.names import Resolver, new_boot_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger("penstock.worker")

RING_SLOTS = 4
"""Hand-overs between two stages that may be under way: one is computed, one travels, and two more
take up what differs between the stages' times."""


class Worker(Protocol):
    """A prefill or decode worker."""

    async def start(self) -> None:
        """Bind and serve."""

    async def drain(self, seconds: float) -> None:
        """Let what runs end."""

    async def close(self) -> None:
        """Stop."""

    def describe(self) -> Mapping[str, object]:
        """Return the JSON of /state."""


class Process:
    """One worker process, from its settings to its end."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._health = Health()
        self._worker: Worker | None = None
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._compute = Compute(settings.threads)

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_failure)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        registry = CollectorRegistry()
        registry.register(WorkerCollector(self._settings, self._describe))
        async with serving(create_app(self._health, registry, self._describe), self._settings.http):
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
        worker, transfer = start.result()
        self._worker = worker
        self._health.state, self._health.progress, self._health.message = "ready", 1.0, ""
        log.info("%s is ready", self._settings.name)
        await stop
        if self._failure is None:
            self._health.state = "draining"
            log.info("%s drains", self._settings.name)
            await worker.drain(self._settings.drain_seconds)
        await worker.close()
        await transfer.close()

    def _describe(self) -> Mapping[str, object]:
        described: dict[str, object] = {
            "name": self._settings.name,
            "state": self._health.state,
            "busy_seconds": self._compute.busy_seconds,
        }
        return described | (dict(self._worker.describe()) if self._worker is not None else {})

    def _on_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A part that failed would leave a worker that looks alive: end it, it is started anew.
        loop.default_exception_handler(context)
        if isinstance(error := context.get("exception"), BaseException):
            self._failure = error
            self._stop.set()

    # --- start ---------------------------------------------------------------------------------

    async def _start(self) -> tuple[Worker, NixlTransfer]:
        settings = self._settings
        keys = Keys.load(settings.keys)
        self._health.message = f"fetching {settings.model}"
        path = await asyncio.to_thread(self._fetch)
        config = ModelConfig.from_directory(path)
        length = settings.max_model_len or config.max_context
        config.require_context(length)
        self._health.message = "loading weights"
        model = await self._compute.run(self._load, path, config)
        first, last = self._layers(config)
        layout = config.kv_layout(
            layers=(first, last), page_size=settings.page_size, dtype=model.dtype
        )
        pages = settings.kv_memory // layout.page_bytes
        if pages < 2:
            raise ConfigurationError(
                f"--kv-memory {settings.kv_memory} holds {pages} pages of {layout.page_bytes} "
                "bytes: give it more, or lower --page-size"
            )
        pool = await self._compute.run(
            PoolTensor, layout, pages, dtype=model.dtype, device=model.device
        )
        hello = Hello(
            role=settings.role,
            name=settings.name,
            boot_id=new_boot_id(),
            revision=settings.revision,
            group=settings.group,
            stage=settings.stage,
            stages=settings.stages,
            model_digest=await asyncio.to_thread(model_digest, path),
            kv_layout=config.kv_layout_digest(page_size=settings.page_size, dtype=model.dtype),
            layers=(first, last),
            pages=pages,
            page_size=settings.page_size,
            max_model_len=length,
        )
        transfer = NixlTransfer(NixlSettings(devices=settings.net_device))
        make = self._prefill if settings.role == "prefill" else self._decode
        worker = make(hello, keys, model, pool, transfer)
        await worker.start()
        return worker, transfer

    def _fetch(self) -> Path:
        settings = self._settings
        return model_source.resolve(
            settings.model,
            cache_dir=settings.model_cache,
            token_file=settings.model_token_file,
            endpoint=settings.hub_endpoint,
            progress=self._progress("fetching the model", 0.0, 0.5),
        )

    def _load(self, path: Path, config: ModelConfig) -> Transformer:
        settings = self._settings
        return Transformer.load(
            path,
            config,
            layers=self._layers(config),
            embed=settings.stage == 0,
            head=settings.role == "decode",
            dtype=config.dtype if settings.dtype == "auto" else DTYPES[settings.dtype],
            device=torch.device(settings.device),
            progress=self._progress("loading weights", 0.5, 1.0),
        )

    def _layers(self, config: ModelConfig) -> tuple[int, int]:
        settings = self._settings
        if settings.role == "decode":
            return 0, config.layers
        if settings.stages > config.layers:
            raise ConfigurationError(
                f"{settings.stages} stages cannot share {config.layers} layers: "
                "lower prefill.pipelineParallel"
            )
        return split_layers(config.layers, settings.stages, 1.0)[settings.stage]

    def _progress(self, what: str, first: float, last: float) -> _Progress:
        return _Progress(self._health, what, first, last)

    def _decode(
        self, hello: Hello, keys: Keys, model: Transformer, pool: PoolTensor, transfer: NixlTransfer
    ) -> Worker:
        settings = self._settings
        return DecodeWorker(
            hello=hello,
            bind=settings.bind,
            keys=keys,
            resolver=Resolver(settings.hosts_file),
            health=self._health,
            runner=DecodeRunner(model, pool),
            compute=self._compute,
            transfer=transfer,
            arena=_region(pool),
            layout=pool.layout,
            settings=DecodeSettings(
                max_running=settings.max_batch,
                max_batch_tokens=max(
                    settings.max_chunk_tokens, settings.max_batch + settings.page_size
                ),
                remote=RemoteSettings(least_tokens=settings.local_prefill_tokens + 1),
            ),
        )

    def _prefill(
        self, hello: Hello, keys: Keys, model: Transformer, pool: PoolTensor, transfer: NixlTransfer
    ) -> Worker:
        settings = self._settings
        tokens = max(settings.max_chunk_tokens, settings.page_size)
        shape = (RING_SLOTS, tokens, model.config.hidden_size)
        ring = ActivationRing(
            transfer,
            f"{hello.name}/{hello.boot_id}",
            torch.zeros(shape, dtype=model.dtype, device=model.device),
            torch.zeros(shape, dtype=model.dtype, device=model.device),
        )
        identity = StageIdentity(
            name=hello.name, boot_id=hello.boot_id, group=hello.group, stage=hello.stage
        )
        return PrefillWorker(
            hello=hello,
            bind=settings.bind,
            peers=[settings.peer(i) for i in range(1, settings.stages)] if not hello.stage else [],
            keys=keys,
            resolver=Resolver(settings.hosts_file),
            health=self._health,
            runner=StageRunner(model, pool, embeds=hello.stage == 0),
            compute=self._compute,
            ring=ring,
            kv=KvWriter(transfer, identity, _region(pool), pool.layout),
            planner=ChunkPlanner(
                settings.stages,
                settings.page_size,
                ChunkSettings(
                    mode=settings.chunk_mode,
                    fixed_tokens=tokens,
                    max_tokens=tokens,
                ),
            ),
        )


class _Progress:
    """Turns (bytes done, bytes in all) into a share of the start."""

    def __init__(self, health: Health, what: str, first: float, last: float) -> None:
        self._health, self._what = health, what
        self._first, self._span = first, last - first

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        self._health.progress = self._first + self._span * share
        self._health.message = f"{self._what}: {share:.0%}"


def _region(pool: PoolTensor) -> Region:
    device = pool.tensor.get_device() if pool.tensor.is_cuda else None
    return Region(pool.address, pool.nbytes, device)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    try:
        settings = parse()
        sys.exit(asyncio.run(Process(settings).run()))
    except (ConfigurationError, InvalidKeys, model_source.ModelSourceError, OSError) as error:
        # Last line of the log: whoever shows a crash shows this.
        print(f"penstock-worker: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
