"""A step that lies ready while the one before is computed: nobody's text depends on it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest
import torch

from penstock_runtime.engine.runner import DecodeRunner
from penstock_wire.messages import Generate, Sampling, pack_tokens
from tests.unit.runtime.engine.decode_engines import Output, generate, running_engine
from tests.unit.runtime.model.checkpoints import VOCAB

OUTPUT = 20


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCAB, (6, 40), generator=generator).tolist()


def request(name, prompt, sampling):
    return Generate(request_id=name, tokens=pack_tokens(prompt), sampling=sampling)


def samplings():
    """Of all kinds that look at the output so far, or end it."""
    return [
        Sampling(seed=1, temperature=0, max_tokens=OUTPUT),
        Sampling(seed=2, temperature=1, max_tokens=OUTPUT, repetition_penalty=1.5),
        Sampling(seed=3, temperature=1, max_tokens=OUTPUT, frequency_penalty=1, logprobs=2),
        Sampling(
            seed=4, temperature=1, max_tokens=OUTPUT, stop_token_ids=tuple(range(0, VOCAB, 9))
        ),
        Sampling(
            seed=5,
            temperature=1,
            max_tokens=OUTPUT,
            stop_token_ids=tuple(range(0, VOCAB, 2)),
            min_tokens=7,
        ),
        Sampling(seed=6, temperature=1, max_tokens=1),
    ]


@pytest.mark.parametrize("chunk", [512, 17])
async def test_text_is_the_same_as_step_by_step(model, prompts, chunk):
    requests = list(zip(prompts, samplings(), strict=True))
    one = await generate(model, requests, chunk=chunk)
    assert min(map(len, one)) == 1
    assert len(one[3]) < OUTPUT
    assert 7 <= len(one[4]) < OUTPUT
    assert await generate(model, requests, chunk=chunk, steps_out=2) == one


@dataclass
class Gate:
    """Holds each step back until it is let through."""

    begun: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    """The number of rows of each step that has begun."""
    passes: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def runner(self) -> type[DecodeRunner]:
        loop, gate = asyncio.get_running_loop(), self

        class Gated(DecodeRunner):
            def step(self, batch, rows):
                loop.call_soon_threadsafe(gate.begun.put_nowait, batch.tokens)
                assert gate.passes.acquire(timeout=20)
                return super().step(batch, rows)

        return Gated


async def test_a_request_that_comes_in_meanwhile_is_in_the_very_next_step(
    model, prompts, monkeypatch
):
    gate, (first, second) = Gate(), (Output(), Output())
    sampling = Sampling(seed=0, temperature=0, max_tokens=3)
    async with (
        running_engine(model, steps_out=2, runner=gate.runner()) as engine,
        asyncio.timeout(30),
    ):
        withdraw, withdrawn = engine.scheduler.withdraw_step, asyncio.Event()

        def withdraw_step(batch):
            withdraw(batch)
            withdrawn.set()

        monkeypatch.setattr(engine.scheduler, "withdraw_step", withdraw_step)
        engine.generate(request("a", prompts[0], sampling), "router", first.take)
        assert await gate.begun.get() == 40
        # By now the next step, a's second token, lies ready.
        engine.generate(request("b", prompts[1][:9], sampling), "router", second.take)
        await withdrawn.wait()
        gate.passes.release(9)
        assert await gate.begun.get() == 1 + 9
        await asyncio.gather(first.ended, second.ended)
        assert engine.stats.steps == 4


async def test_tokens_are_streamed_while_the_next_step_is_computed(model, prompts):
    gate, output = Gate(), Output()
    sampling = Sampling(seed=0, temperature=0, max_tokens=3)
    async with (
        running_engine(model, steps_out=2, runner=gate.runner()) as engine,
        asyncio.timeout(30),
    ):
        engine.generate(request("a", prompts[0], sampling), "router", output.take)
        await gate.begun.get()
        gate.passes.release()
        # The second step has begun behind the first without anything else having to happen.
        await gate.begun.get()
        await output.token
        assert len(output.tokens) == 1
        gate.passes.release(9)
        await output.ended
