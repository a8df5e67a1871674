"""The step loop: one step is ready while another one computes."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import torch

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.stage import PrefillStage
from penstock_runtime.errors import PipelineBroken
from penstock_wire.messages import Admit, ChunkItem, Message, Released, StepDone, StepPlan

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from penstock_runtime.attention.base import Segment

PAGE = 4
STEPS = 5


class HeldRunner:
    """Computes a step when the test lets it."""

    page_size = PAGE

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.let = threading.Semaphore(0)

    def run(self, hidden_or_tokens: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        self.begun.append(segments[0].start // PAGE)
        if not self.let.acquire(timeout=20):
            raise TimeoutError("the test let no step through in 20 s")
        return hidden_or_tokens


class Ring:
    """The stage before has computed everything; what this stage hands on is kept."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[int] = asyncio.Queue()
        self.taken = 0
        self.sent: list[float] = []
        self._closed = False

    async def receive(self, tokens: int) -> torch.Tensor:
        if self._closed:
            raise PipelineBroken("the epoch has ended")
        inputs = torch.full((tokens, 1), float(self.taken))
        self.received.put_nowait(self.taken)
        self.taken += 1
        return inputs

    def send(self, hidden: torch.Tensor) -> Coroutine[object, object, None]:
        self.sent.append(float(hidden[0]))
        return asyncio.sleep(0)

    async def close(self) -> None:
        self._closed = True


class Kv:
    def __init__(self) -> None:
        self.pushed: list[int] = []

    async def push(self, admit: Admit, first: int, last: int, start: int, end: int) -> None:
        self.pushed.append(first)

    async def load(self, admit: Admit, first: int, last: int) -> None:
        raise AssertionError("nothing is cached")

    def finish(self, admit: Admit) -> None:
        """Nothing is left."""


class World:
    """A stage in the middle of a group, with one prompt's plans."""

    def __init__(self) -> None:
        self.runner, self.ring, self.kv, self.compute = HeldRunner(), Ring(), Kv(), Compute(1)
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.stage = PrefillStage(
            1,
            3,
            runner=self.runner,
            compute=self.compute,
            ring=self.ring,  # type: ignore[arg-type]
            kv=self.kv,
            to_leader=self.said.put_nowait,
            prompt_tokens=None,
        )
        self.stage.begin(1)
        pages = tuple(range(STEPS))
        admit = Admit(
            key=5,
            grant=9,
            receiver="decode-0/boot",
            incarnation=1,
            pages=pages,
            target_pages=pages,
            length=STEPS * PAGE,
        )
        for step in range(STEPS):
            last = step == STEPS - 1
            self.stage.submit(
                StepPlan(
                    step=step,
                    epoch=1,
                    items=(ChunkItem(5, step * PAGE, PAGE, last),),
                    admit=() if step else (admit,),
                    release=(5,) if last else (),
                )
            )


async def test_the_next_step_is_ready_while_one_computes() -> None:
    world = World()
    async with asyncio.timeout(10):
        # The first computes until it is let, and the second has its inputs all the same.
        assert [await world.ring.received.get() for _ in range(2)] == [0, 1]
        # No third has: its inputs would take memory for nothing.
        assert world.ring.taken == 2
        world.runner.let.release()
        done = await world.said.get()
        assert isinstance(done, StepDone)
        assert done.step == 0
        assert await world.ring.received.get() == 2
        world.runner.let.release(STEPS)
        rest = [await world.said.get() for _ in range(STEPS)]
    await world.stage.end()
    world.compute.close()
    assert [m.step for m in rest if isinstance(m, StepDone)] == [1, 2, 3, 4]
    # Pages are given back behind everything.
    assert isinstance(rest[-1], Released)
    assert world.ring.sent == [0, 1, 2, 3, 4]
    assert world.kv.pushed == [0, 1, 2, 3, 4]


async def test_the_end_of_an_epoch_gives_up_the_step_that_waits() -> None:
    world = World()
    async with asyncio.timeout(10):
        for _ in range(2):
            await world.ring.received.get()
        given = [*world.stage._loops, *world.stage._computing]
        ending = asyncio.create_task(world.stage.end())
        await asyncio.wait(given)
        world.runner.let.release(STEPS)
        await ending
    world.compute.close()
    assert world.runner.begun == [0]
    assert world.said.empty()
