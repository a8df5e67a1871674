"""Puts a worker together from its settings: model, pool, transfer, engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

from penstock_runtime.cuda_device import find_device
from penstock_runtime.engine.cuda_graphs import cuda_capture
from penstock_runtime.engine.decode import steps_out_on
from penstock_runtime.engine.kv_writer import KvWriter, StageIdentity
from penstock_runtime.engine.ring import ActivationRing
from penstock_runtime.engine.runner import DecodeRunner, StageRunner
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.memory import out_of_memory
from penstock_runtime.model.arithmetic import half_layer_flops
from penstock_runtime.model.config import DTYPES, ModelConfig
from penstock_runtime.model.shard import Shard
from penstock_runtime.model.transformer import Transformer
from penstock_runtime.model.weights import model_digest
from penstock_runtime.scheduler.admission import RemoteSettings
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.decode import DecodeSettings
from penstock_runtime.scheduler.layer_split import split_layers
from penstock_runtime.worker.decode import DecodeWorker
from penstock_runtime.worker.prefill import PrefillWorker
from penstock_runtime.worker.prepare import capture_graphs, warm_up
from penstock_runtime.worker.rank_group import RankGroup
from penstock_wire import model_source
from penstock_wire.keys import Keys
from penstock_wire.messages import Hello
from penstock_wire.names import Resolver, new_boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.engine.cuda_graphs import DecodeGraphs
    from penstock_runtime.kvcache.base import LayerRange
    from penstock_runtime.kvcache.tensors import PoolTensor
    from penstock_runtime.transfer.base import Transfer
    from penstock_runtime.worker.http import Health
    from penstock_runtime.worker.rank_group import Place
    from penstock_runtime.worker.settings import WorkerSettings

RING_SLOTS = 4
"""Hand-overs between two stages that may be under way: one is computed, one travels, and two more
take up what differs between the stages' times."""
_DIVIDED_FOR_TOKENS = 16384
"""The prompt for which all stages have the same arithmetic. Pipelines are for long ones, and
attention's part of a layer grows with them."""
_LOADED_ON_CUDA = 0.9
"""How much of the start is done when the weights are there, if graphs are still to be captured."""


class Builder:
    """Makes the worker of one process.

    Args:
        settings: the command line.
        health: told how far the start is.
        compute: where the model is loaded and will run.
        transfer: the data path.
        places: of the ranks, see `RankGroup`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        health: Health,
        compute: Compute,
        transfer: Transfer,
        places: Sequence[Place] = (),
    ) -> None:
        self._settings = settings
        self._health = health
        self._compute = compute
        self._transfer = transfer
        self._places = places

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
        part = Shard(0, settings.tensor_parallel).local(config)
        layers = self._layers(config)
        dtype = config.dtype if settings.dtype == "auto" else DTYPES[settings.dtype]
        layout = part.kv_layout(layers=layers, page_size=settings.page_size, dtype=dtype)
        self._health.message = "loading weights"
        ranks = RankGroup(
            settings, config, layers=layers, dtype=dtype, layout=layout, places=self._places
        )
        try:
            await ranks.start(path)
            model = await self._compute.run(self._load, path, config, layers, dtype, ranks)
            if settings.tensor_parallel > 1:
                self._health.message = "waiting for the worker's other ranks"
            await ranks.loaded()
            pool = await self._compute.run(ranks.take_pool, model)
            await ranks.connect(self._compute)
            graphs = await self._compute.run(self._graphs, model, pool, length)
        except BaseException:
            await ranks.others.close()
            raise
        hello = Hello(
            role=settings.role,
            name=settings.name,
            boot_id=new_boot_id(),
            revision=settings.revision,
            group=settings.group,
            stage=settings.stage,
            stages=settings.stages,
            model_digest=await asyncio.to_thread(model_digest, path),
            kv_layout=config.kv_layout_digest(page_size=settings.page_size, dtype=dtype),
            layers=layers,
            # The padding of graphs writes to the last page.
            pages=pool.pages if graphs is None else pool.pages - 1,
            page_size=settings.page_size,
            max_model_len=length,
        )
        if settings.role == "prefill":
            # On the compute thread: when it returns, the memory is zero, on a GPU too.
            ring = await self._compute.run(self._ring, hello, model)
            return self._prefill(hello, keys, model, pool, ring, ranks)
        runner = DecodeRunner(model, pool, graphs=graphs, followers=ranks.others)
        return self._decode(hello, keys, runner, ranks)

    def _graphs(self, model: Transformer, pool: PoolTensor, length: int) -> DecodeGraphs | None:
        """On CUDA, prove that the largest step can be computed, and capture decode steps."""
        settings = self._settings
        decodes = settings.role == "decode"
        if model.device.type != "cuda" or model.ranks.size > 1:
            # With several ranks all of them would have to capture, and to warm up, together.
            return None
        self._health.message = "preparing kernels"
        tokens = max(self._step_tokens(), 2)
        warm_up(model, pool, tokens=tokens, embed=settings.stage == 0, head=decodes)
        if not decodes:
            return None
        return capture_graphs(
            model,
            pool,
            max_batch=settings.max_batch,
            max_tokens=length,
            capture=cuda_capture(model.device),
            progress=self._progress("capturing CUDA graphs", _LOADED_ON_CUDA, 1.0),
        )

    def _step_tokens(self) -> int:
        """Return the most tokens of one step."""
        settings = self._settings
        if settings.role == "prefill":
            return max(settings.max_chunk_tokens, settings.page_size)
        return max(settings.max_chunk_tokens, settings.max_batch + settings.page_size)

    def _fetch(self) -> Path:
        settings = self._settings
        return model_source.resolve(
            settings.model,
            cache_dir=settings.model_cache,
            token_file=settings.model_token_file,
            endpoint=settings.hub_endpoint,
            progress=self._progress(model_source.FETCHING, 0.0, 0.5),
        )

    def _load(
        self,
        path: Path,
        config: ModelConfig,
        layers: LayerRange,
        dtype: torch.dtype,
        ranks: RankGroup,
    ) -> Transformer:
        settings = self._settings
        device = find_device(settings.device)
        loaded = _LOADED_ON_CUDA if device.type == "cuda" else 1.0
        remedy = "divide the model with prefill.pipelineParallel or tensorParallel"
        with out_of_memory("The weights", remedy):
            return Transformer.load(
                path,
                config,
                layers=layers,
                embed=settings.stage == 0,
                head=settings.role == "decode",
                dtype=dtype,
                device=device,
                kernels=settings.kernels,
                ranks=ranks.collective,
                progress=self._progress("loading weights", 0.5, loaded),
            )

    def _layers(self, config: ModelConfig) -> LayerRange:
        settings = self._settings
        if settings.role == "decode":
            return 0, config.layers
        if settings.stages > config.layers:
            raise ConfigurationError(
                f"{settings.stages} stages cannot share {config.layers} layers: "
                "lower prefill.pipelineParallel"
            )
        given = settings.layers_per_stage
        if not given:
            costs = half_layer_flops(config, min(_DIVIDED_FOR_TOKENS, config.max_context))
            return split_layers(costs, settings.stages)[settings.stage]
        if sum(given) != config.layers:
            raise ConfigurationError(
                f"--layers-per-stage has {sum(given):g} layers in all, this model {config.layers}"
            )
        first = sum(given[: settings.stage])
        return first, first + given[settings.stage]

    def _progress(self, what: str, first: float, last: float) -> _Progress:
        return _Progress(self._health, what, first, last)

    def _decode(
        self, hello: Hello, keys: Keys, runner: DecodeRunner, ranks: RankGroup
    ) -> DecodeWorker:
        settings = self._settings
        return DecodeWorker(
            hello=hello,
            bind=settings.bind,
            keys=keys,
            resolver=Resolver(settings.hosts_file),
            health=self._health,
            runner=runner,
            compute=self._compute,
            transfer=self._transfer,
            arenas=ranks.arenas,
            others=ranks.others,
            settings=DecodeSettings(
                max_running=settings.max_batch,
                max_batch_tokens=self._step_tokens(),
                steps_out=steps_out_on(settings.device),
                remote=RemoteSettings(
                    least_tokens=settings.local_prefill_tokens + 1,
                    group_wait_seconds=settings.group_wait_seconds,
                ),
            ),
        )

    def _ring(self, hello: Hello, model: Transformer) -> ActivationRing:
        shape = (RING_SLOTS, self._step_tokens(), model.config.hidden_size)
        return ActivationRing(
            self._transfer,
            f"{hello.name}/{hello.boot_id}",
            torch.zeros(shape, dtype=model.dtype, device=model.device),
            torch.zeros(shape, dtype=model.dtype, device=model.device),
            streams=self._compute.streams,
        )

    def _prefill(
        self,
        hello: Hello,
        keys: Keys,
        model: Transformer,
        pool: PoolTensor,
        ring: ActivationRing,
        ranks: RankGroup,
    ) -> PrefillWorker:
        settings = self._settings
        tokens = self._step_tokens()
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
            runner=StageRunner(
                model,
                pool,
                embeds=hello.stage == 0,
                last=hello.stage == hello.stages - 1,
                followers=ranks.others,
            ),
            compute=self._compute,
            ring=ring,
            kv=KvWriter(self._transfer, identity, ranks.arenas, pool.layout),
            others=ranks.others,
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
