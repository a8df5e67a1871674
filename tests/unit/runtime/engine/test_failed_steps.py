"""A step fails: for its requests alone, or for the worker, if nothing can be computed any more."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.runner import DecodeRunner, StageRunner
from penstock_runtime.errors import DeviceFailed, RankLost
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.collective import Alone
from penstock_runtime.scheduler.batch import Batch, BatchSegment
from penstock_wire.messages import Failed, Generate, Sampling, pack_tokens
from tests.unit.runtime.engine.decode_engines import Output, new_engine, running_engine
from tests.unit.runtime.model.checkpoints import whole_model

if TYPE_CHECKING:
    from penstock_wire.messages import Message

PROMPT = list(range(3, 43))
GREEDY = Sampling(seed=0, temperature=0, max_tokens=9)


class BrokenRanks(Alone):
    """This rank's view of two, the other of which is gone."""

    size = 2

    def sum(self, x):
        raise RuntimeError("Connection reset by peer")


@pytest.fixture(scope="module")
def broken_model(llama):
    return whole_model(llama, kernels="torch", ranks=BrokenRanks())


def request(name, prompt=PROMPT):
    return Generate(request_id=name, tokens=pack_tokens(prompt), sampling=GREEDY)


def failing(error: Exception, call: int) -> type[DecodeRunner]:
    """Return a runner whose `call`-th step fails."""

    class Failing(DecodeRunner):
        calls = 0

        def step(self, batch, rows):
            self.calls += 1
            if self.calls == call:
                raise error
            return super().step(batch, rows)

    return Failing


@pytest.mark.parametrize("steps_out", [1, 2])
async def test_it_ends_the_requests_of_all_steps_that_are_out(model, steps_out):
    failures: asyncio.Queue[Failed] = asyncio.Queue()

    def take(*messages: Message) -> None:
        for message in messages:
            if isinstance(message, Failed):
                failures.put_nowait(message)

    runner = failing(RuntimeError("out of registers"), 3)
    async with (
        running_engine(model, steps_out=steps_out, runner=runner) as engine,
        asyncio.timeout(30),
    ):
        for name in "ab":
            engine.generate(request(name), "router", take)
        failed = [await failures.get(), await failures.get()]
        assert {failure.request_id for failure in failed} == {"a", "b"}
        assert all("out of registers" in failure.message for failure in failed)
        assert engine.scheduler.idle
        counts = engine.pool.counts()
        assert counts.resident == 0
        # It goes on for others.
        after = Output()
        engine.generate(request("c", PROMPT[::-1]), "router", after.take)
        await after.ended


@pytest.mark.parametrize("steps_out", [1, 2])
@pytest.mark.parametrize("error", [RankLost("rank 1"), torch.AcceleratorError("illegal address")])
async def test_the_engine_ends_where_nothing_can_be_computed_any_more(model, error, steps_out):
    """Requests hear nothing: their router sends them elsewhere when the worker is gone."""
    output, runner = Output(), failing(error, 3)
    with new_engine(model, steps_out=steps_out, runner=runner) as engine:
        engine.generate(request("a"), "router", output.take)
        async with asyncio.timeout(30):
            with pytest.raises((RankLost, DeviceFailed), match=str(error)):
                await engine.run()
        assert len(output.tokens) == 2
        assert not output.ended.done()
        await engine.close()


def test_a_sum_that_fails_is_a_rank_that_is_lost(broken_model):
    pool = pool_of(broken_model)
    segment = Segment(start=0, length=4, pages=[0])
    stage = StageRunner(broken_model, pool, embeds=True, last=False)
    with pytest.raises(RankLost, match=r"2 ranks .* Connection reset by peer"):
        stage.run(torch.tensor(PROMPT[:4]), [segment])
    decode = DecodeRunner(broken_model, pool)
    with pytest.raises(RankLost, match=r"2 ranks .* Connection reset by peer"):
        decode.step(batch_of(PROMPT[:4]), [])


def test_a_rank_alone_has_nobody_to_lose(model, monkeypatch):
    def no_plan(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(model.attention, "plan", no_plan)
    with pytest.raises(RuntimeError, match=r"^out of registers$"):
        DecodeRunner(model, pool_of(model)).step(batch_of(PROMPT[:4]), [])


async def test_a_device_that_fails_is_told_from_a_step_that_fails():
    compute = Compute(1)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(DeviceFailed, match="the device failed: illegal address"):
        await compute.run(fail, torch.AcceleratorError("illegal address"))
    with pytest.raises(torch.OutOfMemoryError):
        await compute.run(fail, torch.OutOfMemoryError("out of memory"))
    compute.close()


def pool_of(model) -> PoolTensor:
    layout = model.config.kv_layout(layers=(0, model.num_layers), page_size=8, dtype=model.dtype)
    return PoolTensor(layout, 4, dtype=model.dtype, device=model.device)


def batch_of(prompt: list[int]) -> Batch:
    segment = BatchSegment("a", 0, array("i", prompt), (0,), sample=False, position=0)
    return Batch((segment,))
