"""A decode worker's engine over a tiny model, without sockets and prefill groups."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.decode import DecodeEngine
from penstock_runtime.engine.runner import DecodeRunner
from penstock_runtime.engine.streams import streams_of
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.scheduler.decode import DecodeScheduler, DecodeSettings
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_wire.messages import Generate, Sampling, Tokens, pack_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from penstock_runtime.model.transformer import Transformer
    from penstock_wire.messages import Message


@contextmanager
def new_engine(
    model: Transformer,
    *,
    chunk: int = 64,
    threads: int = 1,
    page_size: int = 8,
    steps_out: int = 1,
    runner: type[DecodeRunner] = DecodeRunner,
) -> Iterator[DecodeEngine]:
    """Make an engine without prefill groups."""
    layout = model.config.kv_layout(
        layers=(0, model.num_layers), page_size=page_size, dtype=model.dtype
    )
    settings = DecodeSettings(max_running=7, max_batch_tokens=chunk, steps_out=steps_out)
    memory = PoolTensor(layout, 400, dtype=model.dtype, device=model.device)
    pool = PagePool(memory.pages, page_size)
    compute = Compute(threads, streams_of(model.device))
    try:
        yield DecodeEngine(
            scheduler=DecodeScheduler(pool, 200, settings),
            pool=pool,
            ledger=GrantLedger(pool),
            runner=runner(model, memory),
            compute=compute,
            model_digest="test",
            open_group=lambda *_: pytest.fail("no prefill group was announced"),
            on_change=lambda: None,
        )
    finally:
        compute.close()


@asynccontextmanager
async def running_engine(model: Transformer, **options: Any) -> AsyncIterator[DecodeEngine]:
    """Run an engine, made with the options of `new_engine`."""
    with new_engine(model, **options) as engine:
        loop = asyncio.create_task(engine.run())
        try:
            yield engine
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)


async def generate(
    model: Transformer,
    requests: list[tuple[list[int], Sampling]],
    *,
    rounds: int = 1,
    **options: Any,
) -> list[list[int]]:
    """Run requests at once, the same again `rounds` times (cached); return the last's tokens."""
    ids = map(str, itertools.count())
    async with running_engine(model, **options) as engine:
        for _ in range(rounds):
            outputs = [Output() for _ in requests]
            for (prompt, sampling), output in zip(requests, outputs, strict=True):
                request = Generate(
                    request_id=next(ids), tokens=pack_tokens(prompt), sampling=sampling
                )
                engine.generate(request, output, output.take)
            async with asyncio.timeout(60):
                for output in outputs:
                    await output.ended
    return [output.tokens for output in outputs]


class Output:
    """What is streamed for one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.token: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the first token."""

    def take(self, *messages: Message) -> None:
        for message in messages:
            assert isinstance(message, Tokens), message
            self.tokens += [token.id for token in message.tokens]
            if not self.token.done():
                self.token.set_result(None)
            if message.finish:
                self.ended.set_result(None)
