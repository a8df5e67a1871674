"""Our engine as `engine_worker.py` measures it: what a decode worker runs in aggregated mode.

Scheduler, prefix cache, compute thread, sampler and streaming callbacks are all in it; sockets and
transfers are not.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engine_worker import MAX_MODEL_LEN, Generated

from penstock_runtime.attention.paged_cpu import PagedCpuAttention, Timings
from penstock_runtime.cuda_device import find_device
from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.cuda_graphs import cuda_capture
from penstock_runtime.engine.decode import DecodeEngine, steps_out_on
from penstock_runtime.engine.runner import DecodeRunner
from penstock_runtime.engine.streams import streams_of
from penstock_runtime.kernels.limits import measure_limits
from penstock_runtime.kernels.native import Kernels
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import DTYPES, ModelConfig
from penstock_runtime.model.transformer import Transformer
from penstock_runtime.scheduler.decode import DecodeScheduler, DecodeSettings
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_runtime.worker.prepare import capture_graphs, warm_up
from penstock_wire.garbage import keep_what_is_there
from penstock_wire.messages import Generate, Sampling, Tokens, pack_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from engine_worker import Options

    from penstock_runtime.engine.cuda_graphs import DecodeGraphs
    from penstock_wire.messages import Message

PAGE_SIZE = 32
"""The default of the workers."""


class Engine:
    """A decode worker's engine that prefills for itself."""

    def __init__(self, options: Options, device: str = "cpu") -> None:
        self._runner = asyncio.Runner()
        found = find_device(device)
        self._compute = Compute(options.threads, streams_of(found))
        self._request_ids = map(str, itertools.count(1))
        self._timings: Timings | None = None
        model, memory = self._run(_load, options, found)
        self._matrix_bytes = model.matrix_bytes or 0
        if isinstance(model.attention, PagedCpuAttention):
            self._timings = model.attention.timings = Timings()
        settings = DecodeSettings(
            max_batch_tokens=options.chunk_tokens, steps_out=steps_out_on(found.type)
        )
        graphs = None
        if found.type == "cuda":
            graphs = self._run(_prepare, options, model, memory, settings.max_running)
        pool = PagePool(memory.pages - 1 if graphs else memory.pages, PAGE_SIZE)
        self._engine = DecodeEngine(
            scheduler=DecodeScheduler(pool, MAX_MODEL_LEN, settings),
            pool=pool,
            ledger=GrantLedger(pool),
            runner=DecodeRunner(model, memory, graphs=graphs),
            compute=self._compute,
            model_digest="benchmark",
            open_group=_no_group,
            on_change=lambda: None,
        )
        keep_what_is_there()  # as a worker does

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the function's result, computed on the engine's own thread."""

        async def run() -> Any:
            return await self._compute.run(function, *arguments)

        return self._runner.run(run())

    def generate(self, prompt_tokens: list[list[int]], count: int) -> Generated:
        """See `engine_worker.Engine`."""
        return self._runner.run(self._generate(prompt_tokens, count))

    async def _generate(self, prompt_tokens: list[list[int]], count: int) -> Generated:
        sampling = Sampling(seed=0, temperature=0, max_tokens=count)
        # Its loop runs during the call only: an engine that waits leaves the cores alone.
        async with asyncio.TaskGroup() as group:
            loop = group.create_task(self._engine.run())
            started = time.perf_counter()
            outputs = [_Output() for _ in prompt_tokens]
            for tokens, output in zip(prompt_tokens, outputs, strict=True):
                request = Generate(
                    request_id=next(self._request_ids),
                    tokens=pack_tokens(tokens),
                    sampling=sampling,
                )
                self._engine.generate(request, self, output.take)
            for output in outputs:
                await output.ended
            seconds = time.perf_counter() - started
            loop.cancel()
        return Generated(seconds, [output.tokens for output in outputs])

    def parts(self) -> dict[str, float]:
        """See `engine_worker.Engine`: the seconds of `step`, the model and the sampler, of which
        `attention`, of which `gather`; and the number of `steps`, which are no seconds. The rest of
        a sample's time is the engine around the model.
        """
        stats, timings = self._engine.stats, self._timings
        parts = {"step": stats.compute_seconds, "steps": float(stats.steps)}
        stats.compute_seconds, stats.steps = 0.0, 0
        if timings is not None:
            parts |= {"attention": timings.attention, "gather": timings.gather}
            timings.attention = timings.gather = 0.0
        return parts

    def limits(self) -> dict[str, float]:
        """See `engine_worker.Engine`: with the engine's own threads. Needs the C++ kernels.

        And `matrix_bytes`, what these keep the model's matrices in.
        """
        limits: dict[str, float] = self._run(_limits)
        return limits | {"matrix_bytes": float(self._matrix_bytes)}


class _Output:
    """What the engine streams for one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, *messages: Message) -> None:
        """Take what one step gave."""
        for message in messages:
            if not isinstance(message, Tokens):
                self.ended.set_exception(RuntimeError(f"the engine refused: {message}"))
                return
            self.tokens += [token.id for token in message.tokens]
            if message.finish:
                self.ended.set_result(None)


def _load(options: Options, device: torch.device) -> tuple[Transformer, PoolTensor]:
    config = ModelConfig.from_directory(options.model)
    dtype, layers = DTYPES[options.dtype], (0, config.layers)
    model = Transformer.load(
        options.model,
        config,
        layers=layers,
        embed=True,
        head=True,
        dtype=dtype,
        device=device,
        kernels=options.kernels,
    )
    layout = config.kv_layout(layers=layers, page_size=PAGE_SIZE, dtype=dtype)
    pages = options.kv_bytes // layout.page_bytes
    return model, PoolTensor(layout, pages, dtype=dtype, device=model.device)


def _prepare(
    options: Options, model: Transformer, memory: PoolTensor, max_batch: int
) -> DecodeGraphs | None:
    """Do what a decode worker does on CUDA before it serves."""
    warm_up(model, memory, tokens=options.chunk_tokens, embed=True, head=True)
    return capture_graphs(
        model,
        memory,
        max_batch=max_batch,
        max_tokens=MAX_MODEL_LEN,
        capture=cuda_capture(model.device),
        progress=lambda _done, _total: None,
    )


def _no_group(*_: object) -> Any:
    raise AssertionError("no prefill group was announced")


def _limits() -> dict[str, float]:
    limits = asdict(measure_limits(Kernels()))
    return {name: value for name, value in limits.items() if value is not None}
