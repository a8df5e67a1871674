"""The text of a request is the same alone and beside others, and however its prompt was cut."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.decode import DecodeEngine
from penstock_runtime.engine.runner import DecodeRunner
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.transformer import Transformer
from penstock_runtime.scheduler.decode import DecodeScheduler, DecodeSettings
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_wire.messages import Generate, Sampling, Tokens, pack_tokens
from tests.unit.runtime.kernels.built import built_kernels
from tests.unit.runtime.model.checkpoints import CONFIGS, VOCAB, save

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_wire.messages import Message

OUTPUT = 12
PROMPTS = 7
DTYPES = {"llama": torch.bfloat16, "qwen3": torch.float32}


@pytest.fixture(scope="module", params=DTYPES)
def model(request, tmp_path_factory):
    built_kernels()
    path = tmp_path_factory.mktemp("model")
    save(CONFIGS[request.param], path)
    config = ModelConfig.from_directory(path)
    return Transformer.load(
        path,
        config,
        layers=(0, config.layers),
        embed=True,
        head=True,
        dtype=DTYPES[request.param],
        device=torch.device("cpu"),
        kernels="native",
    )


@pytest.fixture(scope="module")
def requests():
    """Prompts of different lengths, some with a common beginning, some sampled."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCAB, (PROMPTS, 90), generator=generator).tolist()
    made = []
    for index, row in enumerate(tokens):
        prompt = tokens[0][:40] + row[40:] if index % 3 == 0 else row
        temperature = 0.0 if index % 2 else 1.0
        sampling = Sampling(seed=index, temperature=temperature, max_tokens=OUTPUT)
        made.append((prompt[: 90 - 9 * index], sampling))
    return made


@asynccontextmanager
async def running_engine(
    model: Transformer, *, chunk: int, threads: int = 1, page_size: int = 8
) -> AsyncIterator[DecodeEngine]:
    """Run an engine without prefill groups."""
    layout = model.config.kv_layout(
        layers=(0, model.num_layers), page_size=page_size, dtype=model.dtype
    )
    settings = DecodeSettings(max_running=PROMPTS, max_batch_tokens=chunk)
    memory = PoolTensor(layout, 400, dtype=model.dtype, device=model.device)
    pool, compute = PagePool(memory.pages, page_size), Compute(threads)
    engine = DecodeEngine(
        scheduler=DecodeScheduler(pool, 200, settings),
        pool=pool,
        ledger=GrantLedger(pool),
        runner=DecodeRunner(model, memory),
        compute=compute,
        model_digest="test",
        open_group=lambda *_: pytest.fail("no prefill group was announced"),
    )
    loop = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        compute.close()


async def generate(
    model: Transformer, requests: list[Any], *, rounds: int = 1, **options: int
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

    def take(self, *messages: Message) -> None:
        for message in messages:
            assert isinstance(message, Tokens), message
            self.tokens += [token.id for token in message.tokens]
            if message.finish:
                self.ended.set_result(None)


async def test_text_alone_equals_text_beside_others(model, requests):
    alone = [(await generate(model, [request], chunk=512))[0] for request in requests]
    assert all(len(tokens) == OUTPUT for tokens in alone)
    for chunk, threads, page_size in [(512, 1, 8), (39, 2, 32), (11, 1, 1)]:
        together = await generate(
            model, requests, chunk=chunk, threads=threads, page_size=page_size
        )
        assert together == alone


async def test_text_from_a_cached_prompt_is_the_same(model, requests):
    alone = (await generate(model, requests[:1], chunk=64))[0]
    again = await generate(model, requests, chunk=64, rounds=2)
    assert again[0] == alone


async def test_tokens_of_a_step_go_to_a_router_together(model, requests):
    """One message a router and step, whatever the number of its streams."""
    sent: list[tuple[Message, ...]] = []
    outputs = {str(index): Output() for index in range(PROMPTS)}

    def reply(*messages: Message) -> None:
        sent.append(messages)
        for message in messages:
            assert isinstance(message, Tokens)
            outputs[message.request_id].take(message)

    async with running_engine(model, chunk=512) as engine:
        for (prompt, sampling), name in zip(requests, outputs, strict=True):
            tokens = pack_tokens(prompt)
            engine.generate(
                Generate(request_id=name, tokens=tokens, sampling=sampling), "router", reply
            )
        async with asyncio.timeout(60):
            for output in outputs.values():
                await output.ended
    assert all(len(output.tokens) == OUTPUT for output in outputs.values())
    assert max(map(len, sent)) == PROMPTS
    assert len(sent) < 3 * OUTPUT
