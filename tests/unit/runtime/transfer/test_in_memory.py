"""The in-memory fabric keeps the transfer contract, and its faults do what they are named for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.base import AgentClosed, PeerLost, TransferTimeout
from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer
from tests.integration.transfer.contract import CONTRACT, TIMEOUT, Side, pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_runtime.transfer.base import Transfer


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
async def test_contract(promise: Callable[[Transfer], Awaitable[None]]) -> None:
    transfer = InMemoryTransfer(Fabric(piece_bytes=4096))
    await promise(transfer)
    await transfer.close()


async def begin_write(source: Side, target: Side, seconds: float = TIMEOUT) -> asyncio.Task[None]:
    """Begin to write all pages and let it come to rest."""
    pages = range(len(source.arena.memory))
    task = asyncio.ensure_future(
        source.agent.write(
            target.agent.name,
            source.arena.ranges(pages),
            target.arena.ranges(pages),
            b"all",
            seconds,
        )
    )
    await settle()
    return task


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(200):
        await asyncio.sleep(0)


def landed(target: Side) -> int:
    return int(target.arena.memory.any(axis=1).sum())


async def test_a_fence_cuts_a_write_between_two_pieces() -> None:
    fabric = Fabric(piece_bytes=8192)
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.hold("source/1", pieces=5)
    write = await begin_write(source, target)
    assert landed(target) == 5
    await target.agent.fence()
    fabric.unhold("source/1")
    with pytest.raises(PeerLost):
        await write
    assert landed(target) == 5
    assert target.received.empty()


async def test_the_initiators_fence_ends_its_operations() -> None:
    fabric = Fabric(piece_bytes=8192)
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.hold("source/1", pieces=3)
    write = await begin_write(source, target)
    await source.agent.fence()
    with pytest.raises(AgentClosed):
        await write
    assert landed(target) == 3


async def test_a_timeout_does_not_cancel() -> None:
    fabric = Fabric(piece_bytes=8192)
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.pause("target/1")
    with pytest.raises(TransferTimeout, match="fence"):
        await (await begin_write(source, target, seconds=0.01))
    assert landed(target) == 0
    fabric.resume("target/1")
    assert await target.next() == b"all"
    assert landed(target) == 64


async def test_a_paused_target_hears_nothing_until_it_runs() -> None:
    fabric = Fabric()
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.pause("target/1")
    await source.agent.notify("target/1", b"first")
    await source.agent.notify("target/1", b"second")
    await settle()
    assert target.received.empty()
    fabric.resume("target/1")
    assert [await target.next(), await target.next()] == [b"first", b"second"]


async def test_a_paused_agent_can_be_fenced() -> None:
    fabric = Fabric()
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.pause("target/1")
    await source.agent.notify("target/1", b"never heard")
    await asyncio.wait_for(target.agent.fence(), TIMEOUT)
    fabric.resume("target/1")
    await settle()
    assert target.received.empty()


async def test_bytes_of_a_dead_writer_still_land() -> None:
    fabric = Fabric(piece_bytes=8192)
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.hold("source/1", pieces=2)
    write = await begin_write(source, target)
    fabric.pause("target/1")
    fabric.crash("source/1", pieces=4)
    await settle()
    assert landed(target) == 2
    fabric.resume("target/1")
    with pytest.raises(PeerLost):
        await write
    assert landed(target) == 6
    assert target.received.empty()


async def test_a_crashed_target_is_lost() -> None:
    fabric = Fabric(piece_bytes=8192)
    source, target = await pair(InMemoryTransfer(fabric))
    fabric.hold("source/1", pieces=2)
    write = await begin_write(source, target)
    fabric.crash("target/1")
    with pytest.raises(PeerLost):
        await write


async def test_two_agents_cannot_share_a_name() -> None:
    transfer = InMemoryTransfer(Fabric())
    await Side(1, 64).open(transfer, "twin/1")
    with pytest.raises(ValueError, match="in use"):
        await Side(1, 64).open(transfer, "twin/1")
