"""Puts a worker together from its settings: model, pool, transfer, engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

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
from penstock_runtime.worker.decode import DecodeWorker
from penstock_runtime.worker.prefill import PrefillWorker
from penstock_wire import model_source
from penstock_wire.keys import Keys
from penstock_wire.messages import Hello
from penstock_wire.names import Resolver, new_boot_id

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.transfer.base import Transfer
    from penstock_runtime.worker.http import Health
    from penstock_runtime.worker.settings import WorkerSettings

RING_SLOTS = 4
"""Hand-overs between two stages that may be under way: one is computed, one travels, and two more
take up what differs between the stages' times."""


class Builder:
    """Makes the worker of one process.

    Args:
        settings: the command line.
        health: told how far the start is.
        compute: where the model is loaded and will run.
        transfer: the data path.
    """

    def __init__(
        self, settings: WorkerSettings, health: Health, compute: Compute, transfer: Transfer
    ) -> None:
        self._settings = settings
        self._health = health
        self._compute = compute
        self._transfer = transfer

    async def build(self) -> PrefillWorker | DecodeWorker:
        """Fetch and load the model, take the KV memory, and return the worker, not started.

        Raises ConfigurationError, InvalidKeys or ModelSourceError, each with cause and remedy.
        """
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
        make = self._prefill if settings.role == "prefill" else self._decode
        return make(hello, keys, model, pool)

    def _fetch(self) -> Path:
        settings = self._settings
        return model_source.resolve(
            settings.model,
            cache_dir=settings.model_cache,
            token_file=settings.model_token_file,
            endpoint=settings.hub_endpoint,
            progress=self._progress(model_source.FETCHING, 0.0, 0.5),
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
            kernels=settings.kernels,
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
        self, hello: Hello, keys: Keys, model: Transformer, pool: PoolTensor
    ) -> DecodeWorker:
        settings = self._settings
        return DecodeWorker(
            hello=hello,
            bind=settings.bind,
            keys=keys,
            resolver=Resolver(settings.hosts_file),
            health=self._health,
            runner=DecodeRunner(model, pool),
            compute=self._compute,
            transfer=self._transfer,
            arena=_region(pool),
            layout=pool.layout,
            settings=DecodeSettings(
                max_running=settings.max_batch,
                max_batch_tokens=max(
                    settings.max_chunk_tokens, settings.max_batch + settings.page_size
                ),
                remote=RemoteSettings(
                    least_tokens=settings.local_prefill_tokens + 1,
                    group_wait_seconds=settings.group_wait_seconds,
                ),
            ),
        )

    def _prefill(
        self, hello: Hello, keys: Keys, model: Transformer, pool: PoolTensor
    ) -> PrefillWorker:
        settings = self._settings
        tokens = max(settings.max_chunk_tokens, settings.page_size)
        shape = (RING_SLOTS, tokens, model.config.hidden_size)
        ring = ActivationRing(
            self._transfer,
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
            kv=KvWriter(self._transfer, identity, _region(pool), pool.layout),
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
