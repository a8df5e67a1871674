"""The text of a request is the same alone and beside others, and however its prompt was cut."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_wire.messages import Generate, Sampling, Tokens, pack_tokens
from tests.unit.runtime.engine.decode_engines import Output, generate, running_engine
from tests.unit.runtime.kernels.built import built_kernels
from tests.unit.runtime.model.checkpoints import CONFIGS, VOCAB, save, whole_model

if TYPE_CHECKING:
    from penstock_wire.messages import Message

OUTPUT = 12
PROMPTS = 7
DTYPES = {"llama": torch.bfloat16, "qwen3": torch.float32}


@pytest.fixture(scope="module", params=DTYPES)
def model(request, tmp_path_factory):
    built_kernels()
    path = tmp_path_factory.mktemp("model")
    save(CONFIGS[request.param], path)
    return whole_model(path, DTYPES[request.param], kernels="native")


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
