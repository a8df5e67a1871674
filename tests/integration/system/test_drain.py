"""The end of a prefill group: nobody leaves too early, and nobody waits for what cannot come."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer
from penstock_runtime.worker import prefill
from penstock_wire.messages import StepDone
from tests.integration.system import checkpoint
from tests.integration.system.service import Shape, eventually, running

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_wire.messages import Message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make(tmp_path_factory.mktemp("model"))


async def test_a_leader_does_not_wait_for_a_stage_that_has_left(
    model: Path, tmp_path: Path
) -> None:
    fabric = Fabric()
    shape = Shape(chunk=16, chunk_mode="fixed")
    async with running(model, tmp_path, shape, lambda: InMemoryTransfer(fabric)) as service:
        leader, stage = service.stages
        prompt = tuple(n % checkpoint.EOS for n in range(1500))
        answer = asyncio.create_task(service.complete(prompt, 8))

        async def under_way() -> bool:
            return stage.stage.busy

        await eventually(under_way, "the prompt to be in the pipeline")
        await stage.close()
        async with asyncio.timeout(30):
            await leader.drain(600)
        # What was cut is resumed: here by the decode worker itself, once its patience ends.
        assert (await answer).tokens == checkpoint.Reference(model).greedy(prompt, 8)


async def test_a_stage_stays_for_its_leaders_prompts_and_leaves_after_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_LINGER_SECONDS", 100.0)
    fabric = Fabric()
    async with running(model, tmp_path, Shape(), lambda: InMemoryTransfer(fabric)) as service:
        leader, stage = service.stages
        before = service.decodes[0].engine.stats.remote_prefills
        leaving = asyncio.create_task(stage.drain(600))
        prompt = tuple(n % checkpoint.EOS for n in range(200))
        answer = await service.complete(prompt, 4)
        assert answer.tokens == checkpoint.Reference(model).greedy(prompt, 4)
        assert service.decodes[0].engine.stats.remote_prefills == before + 1
        assert not leaving.done()
        await leader.close()
        async with asyncio.timeout(30):
            await leaving


async def test_a_leader_leaves_when_the_other_stages_are_the_last_to_finish(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends the last prompt is then a message, and nothing that this stage does."""
    fabric = Fabric()
    async with running(model, tmp_path, Shape(), lambda: InMemoryTransfer(fabric)) as service:
        leader, stage = service.stages
        held: list[Message] = []
        said = stage.stage._to_leader
        monkeypatch.setattr(stage.stage, "_to_leader", held.append)
        prompt = tuple(n % checkpoint.EOS for n in range(200))
        answer = asyncio.create_task(service.complete(prompt, 4))

        async def all_held() -> bool:
            return any(isinstance(message, StepDone) for message in held) and not stage.stage.busy

        await eventually(all_held, "stage 1 to have done its part")
        leaving = asyncio.create_task(leader.drain(600))
        await asyncio.sleep(prefill._NEWS_SECONDS + 0.2)
        assert not leaving.done()
        monkeypatch.setattr(stage.stage, "_to_leader", said)
        for message in held:
            said(message)
        async with asyncio.timeout(30):
            await leaving
        assert (await answer).tokens == checkpoint.Reference(model).greedy(prompt, 4)
