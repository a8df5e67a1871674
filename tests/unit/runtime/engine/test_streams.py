"""Nothing is handed to a transfer before the device has written it, nor given back before read."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.ring import ActivationRing, RingSettings
from penstock_runtime.engine.stage import PrefillStage
from penstock_runtime.engine.streams import HostStreams, streams_of
from penstock_runtime.errors import PipelineBroken
from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer
from penstock_wire.messages import Admit, ChunkItem, Message, Released, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.attention.base import Segment

SHAPE = (2, 4, 3)
QUICK = RingSettings(connect_seconds=2, probe_seconds=0.02)


class LazyDevice:
    """A device on whose queue work waits until somebody waits for it.

    `copies` are held back until `release`: a caller that does not await them sees old bytes.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._queue: list[Callable[[], object]] = []
        self._released = asyncio.Event()
        self._released.set()

    def launch(self, kernel: Callable[[], object]) -> None:
        self.log.append("launch")
        self._queue.append(kernel)

    def enter(self) -> None:
        self.log.append(f"enter {threading.current_thread().name.split('_')[0]}")

    def wait(self) -> None:
        for kernel in self._queue:
            kernel()
        self._queue.clear()
        self.log.append("wait")

    def hold(self) -> None:
        self._released.clear()

    def release(self) -> None:
        self._released.set()

    async def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        await asyncio.sleep(0)
        await self._released.wait()
        target.copy_(source)

    async def clone(self, source: torch.Tensor) -> torch.Tensor:
        target = torch.full_like(source, -1)
        await self.copy(target, source)
        return target


def test_the_cpu_has_nothing_to_wait_for() -> None:
    assert isinstance(streams_of(torch.device("cpu")), HostStreams)


async def test_memory_made_by_compute_can_be_copied_to() -> None:
    compute = Compute(1)
    arena = await compute.run(torch.zeros, 3)
    await compute.streams.copy(arena[:2], torch.ones(2))
    assert (await compute.streams.clone(arena)).tolist() == [1, 1, 0]
    compute.close()


async def test_what_compute_returns_has_been_computed() -> None:
    device = LazyDevice()
    compute = Compute(1, device)
    result = torch.zeros(2)

    def step() -> torch.Tensor:
        device.launch(lambda: result.fill_(7))
        return result

    assert (await compute.run(step)).tolist() == [7, 7]
    assert device.log == ["enter compute", "launch", "wait"]
    compute.close()


async def test_a_step_that_fails_is_reported_as_it_is() -> None:
    compute = Compute(1, LazyDevice())

    def step() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await compute.run(step)
    compute.close()


async def rings(device: LazyDevice) -> tuple[ActivationRing, ActivationRing]:
    fabric = Fabric()
    first, second = (
        ActivationRing(
            InMemoryTransfer(fabric), name, torch.zeros(SHAPE), torch.zeros(SHAPE), QUICK, device
        )
        for name in ("first", "second")
    )
    addresses = await asyncio.gather(first.prepare(1), second.prepare(1))
    await asyncio.gather(first.form(None, addresses[1]), second.form(addresses[0], None))
    return first, second


async def test_activations_leave_when_they_lie_in_the_ring() -> None:
    device = LazyDevice()
    first, second = await rings(device)
    device.hold()
    sending = asyncio.create_task(first.send(torch.full(SHAPE[1:], 5.0)))
    receiving = asyncio.create_task(second.receive(SHAPE[1]))
    await asyncio.wait([sending, receiving], timeout=0.1)
    assert not sending.done()
    device.release()
    assert torch.equal(await asyncio.wait_for(receiving, 5), torch.full(SHAPE[1:], 5.0))
    await sending
    await asyncio.gather(first.close(), second.close())


async def test_a_slot_is_given_back_when_it_has_been_read() -> None:
    device = LazyDevice()
    first, second = await rings(device)
    slots = SHAPE[0]
    for number in range(slots):
        await first.send(torch.full(SHAPE[1:], float(number)))
    device.hold()
    receiving = asyncio.create_task(second.receive(SHAPE[1]))
    blocked = asyncio.create_task(first.send(torch.full(SHAPE[1:], 9.0)))
    await asyncio.wait([receiving, blocked], timeout=0.1)
    assert not blocked.done(), "the slot was written again while it was being read"
    device.release()
    assert torch.equal(await asyncio.wait_for(receiving, 5), torch.zeros(SHAPE[1:]))
    await asyncio.wait_for(blocked, 5)
    await asyncio.gather(first.close(), second.close())


async def test_an_epoch_that_ends_during_a_copy_sends_nothing() -> None:
    device = LazyDevice()
    first, second = await rings(device)
    device.hold()
    sending = asyncio.create_task(first.send(torch.full(SHAPE[1:], 5.0)))
    await asyncio.sleep(0.05)
    await first.close()
    await first.prepare(2)  # another epoch's agent must not carry the old epoch's bytes
    device.release()
    with pytest.raises(PipelineBroken):
        await asyncio.wait_for(sending, 5)
    await asyncio.gather(first.close(), second.close())


class _Runner:
    """Computes on the device: the pages are written when somebody has waited."""

    page_size = 4

    def __init__(self, device: LazyDevice, pages: torch.Tensor) -> None:
        self._device, self._pages = device, pages

    def run(self, hidden_or_tokens: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        hidden = torch.zeros(len(hidden_or_tokens), 3)
        page, mark = segments[0].start // self.page_size, segments[0].start + 1
        self._device.launch(lambda: self._pages[page].fill_(mark))
        self._device.launch(lambda: hidden.fill_(8))
        return hidden


class _Pushed:
    """Notes what lies in the pages when a write of them is posted."""

    def __init__(self, pages: torch.Tensor) -> None:
        self._pages = pages
        self.seen: list[float] = []

    async def push(self, admit: Admit, first: int, last: int, start: int, end: int) -> None:
        self.seen.append(float(self._pages[first]))

    async def load(self, admit: Admit, first: int, last: int) -> None:
        raise AssertionError("nothing is cached")

    def finish(self, admit: Admit) -> None:
        """Nothing is left."""


class _NoRing:
    async def close(self) -> None:
        """The only stage has no neighbours."""


async def test_kv_is_written_to_the_receiver_when_it_has_been_computed() -> None:
    device, pages, released = LazyDevice(), torch.zeros(2), asyncio.Event()
    compute, kv = Compute(1, device), _Pushed(pages)

    def to_leader(message: Message) -> None:
        if isinstance(message, Released):
            released.set()

    stage = PrefillStage(
        0,
        1,
        runner=_Runner(device, pages),
        compute=compute,
        ring=_NoRing(),  # type: ignore[arg-type]
        kv=kv,
        to_leader=to_leader,
        prompt_tokens=lambda _key, _start, length: torch.zeros(length, dtype=torch.int64),
    )
    stage.begin(1)
    admit = Admit(
        key=5,
        grant=9,
        receiver="decode-0/boot",
        incarnation=1,
        pages=(0, 1),
        target_pages=(0, 1),
        length=8,
    )
    stage.submit(StepPlan(step=0, epoch=1, items=(ChunkItem(5, 0, 4, False),), admit=(admit,)))
    stage.submit(StepPlan(step=1, epoch=1, items=(ChunkItem(5, 4, 4, True),), release=(5,)))
    async with asyncio.timeout(10):
        await released.wait()
    await stage.end()
    compute.close()
    assert kv.seen == [1, 5]
