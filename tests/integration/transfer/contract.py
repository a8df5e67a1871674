"""What every implementation of the transfer interface must do. Run for each of them.

Each function gets a Transfer and opens its agents there; both ends live in this process.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.base import AgentClosed, PeerLost
from tests.integration.transfer.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_runtime.transfer.base import Agent, Transfer
    from penstock_runtime.transfer.stats import AgentStats

TIMEOUT = 20.0


class Side:
    """An agent, its arena, and the notifications that it got."""

    def __init__(self, pages: int, page_bytes: int, fill: int = 0) -> None:
        self.arena = Arena(pages, page_bytes, fill)
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.agent: Agent

    async def open(self, transfer: Transfer, name: str) -> Side:
        self.agent = await transfer.open(name, [self.arena.region], self.received.put_nowait)
        return self

    async def next(self) -> bytes:
        return await asyncio.wait_for(self.received.get(), TIMEOUT)


async def pair(transfer: Transfer, pages: int = 64, page_bytes: int = 8192) -> tuple[Side, Side]:
    """Return a source full of random bytes, connected to a target full of zeros."""
    source = await Side(pages, page_bytes).open(transfer, "source/1")
    target = await Side(pages, page_bytes).open(transfer, "target/1")
    source.arena.randomize(7)
    assert await source.agent.connect(target.agent.metadata, TIMEOUT) == target.agent.name
    return source, target


async def write_lands_before_its_notification(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    rng = random.Random(3)
    for number in range(8):
        n = rng.randint(1, 48)
        here, there = rng.sample(range(64), n), rng.sample(range(64), n)
        target.arena.memory[:] = 0
        write = asyncio.ensure_future(
            source.agent.write(
                target.agent.name,
                source.arena.ranges(here),
                target.arena.ranges(there),
                b"chunk %d" % number,
                TIMEOUT,
            )
        )
        assert await target.next() == b"chunk %d" % number
        assert target.arena.checksums(there) == source.arena.checksums(here)
        untouched = [page for page in range(64) if page not in there]
        assert not target.arena.memory[untouched].any()
        await write


async def read_fetches_the_peers_bytes(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    target.arena.randomize(11)
    here, there = [5, 0, 63, 17], [9, 10, 11, 2]
    before = source.arena.checksums()
    await source.agent.read(
        target.agent.name, source.arena.ranges(here), target.arena.ranges(there), TIMEOUT
    )
    after = source.arena.checksums()
    assert [after[page] for page in here] == target.arena.checksums(there)
    assert all(after[page] == before[page] for page in range(64) if page not in here)


async def notifications_keep_their_order(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    for number in range(20):
        await source.agent.notify(target.agent.name, b"%d" % number)
    assert [await target.next() for _ in range(20)] == [b"%d" % number for number in range(20)]


async def both_ends_may_begin(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    await target.agent.connect(source.agent.metadata, TIMEOUT)
    await asyncio.gather(
        source.agent.write(
            target.agent.name,
            source.arena.ranges([0, 1]),
            target.arena.ranges([2, 3]),
            b"there",
            TIMEOUT,
        ),
        target.agent.write(
            source.agent.name,
            target.arena.ranges([40]),
            source.arena.ranges([50]),
            b"back",
            TIMEOUT,
        ),
    )
    assert (await target.next(), await source.next()) == (b"there", b"back")


async def a_peer_that_fenced_is_lost(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    await target.agent.fence()
    with pytest.raises(PeerLost):
        await _write_one(source, target)
    assert not target.arena.memory.any()


async def stale_metadata_reaches_nobody(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    stale = target.agent.metadata
    await target.agent.fence()
    await source.agent.disconnect(target.agent.name)
    successor = await Side(64, 8192).open(transfer, "target/2")

    async def reach_with_stale_metadata() -> None:
        await source.agent.connect(stale, TIMEOUT)
        await _write_one(source, target)

    with pytest.raises(PeerLost):
        await reach_with_stale_metadata()
    assert not target.arena.memory.any()
    assert not successor.arena.memory.any()
    # The new metadata works at once.
    await source.agent.connect(successor.agent.metadata, TIMEOUT)
    await _write_one(source, successor)
    assert await successor.next() == b"one"


async def a_fenced_agent_refuses_everything(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    await asyncio.gather(source.agent.fence(), source.agent.fence())
    await source.agent.fence()
    with pytest.raises(AgentClosed):
        await _write_one(source, target)
    with pytest.raises(AgentClosed):
        await source.agent.notify(target.agent.name, b"late")
    with pytest.raises(AgentClosed):
        await source.agent.connect(target.agent.metadata, TIMEOUT)


async def a_fence_leaves_other_agents_alone(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    other = await Side(64, 8192).open(transfer, "other/1")
    await other.agent.connect(target.agent.metadata, TIMEOUT)
    other.arena.randomize(5)
    write = asyncio.ensure_future(
        other.agent.write(
            target.agent.name,
            other.arena.ranges(range(64)),
            target.arena.ranges(range(64)),
            b"whole",
            TIMEOUT,
        )
    )
    await source.agent.fence()
    await write
    assert await target.next() == b"whole"
    assert target.arena.checksums() == other.arena.checksums()


async def ranges_outside_of_the_regions_are_refused(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    inside, outside = source.arena.ranges([0]), source.arena.ranges([64])
    with pytest.raises(ValueError, match="outside"):
        await source.agent.write(target.agent.name, outside, target.arena.ranges([0]), b"", TIMEOUT)
    with pytest.raises(PeerLost, match="outside"):
        await source.agent.write(target.agent.name, inside, target.arena.ranges([64]), b"", TIMEOUT)
    wrapping = target.arena.ranges([0])
    wrapping[0, 0] = 2**64 - 4096
    with pytest.raises(PeerLost, match="outside"):
        await source.agent.write(target.agent.name, inside, wrapping, b"", TIMEOUT)
    await _write_one(source, target)


async def a_stranger_is_not_reached(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    with pytest.raises(PeerLost):
        await source.agent.notify("nobody/1", b"hello")
    with pytest.raises(PeerLost):
        await source.agent.connect(b"garbage", TIMEOUT)
    with pytest.raises(PeerLost):
        await source.agent.connect(target.agent.metadata[:-9], TIMEOUT)
    await source.agent.disconnect(target.agent.name)
    with pytest.raises(PeerLost):
        await _write_one(source, target)


async def what_was_done_is_counted(transfer: Transfer) -> None:
    source, target = await pair(transfer)
    pages = source.arena.ranges(range(4)), target.arena.ranges(range(4))
    await source.agent.write(target.agent.name, *pages, b"four", TIMEOUT)
    await source.agent.read(target.agent.name, *pages, TIMEOUT)
    await source.agent.notify(target.agent.name, b"alone")
    assert [await target.next(), await target.next()] == [b"four", b"alone"]
    await target.agent.fence()
    with pytest.raises(PeerLost):
        await _write_one(source, target)
    stats: AgentStats = source.agent.stats  # type: ignore[attr-defined]
    assert (stats.done, stats.failed, stats.timed_out, stats.in_flight) == (2, 1, 0, 0)
    assert (stats.bytes_written, stats.bytes_read) == (4 * 8192, 4 * 8192)
    assert stats.notifications_sent == 1
    assert target.agent.stats.notifications_received == 2  # type: ignore[attr-defined]


async def _write_one(source: Side, target: Side) -> None:
    await source.agent.write(
        target.agent.name, source.arena.ranges([1]), target.arena.ranges([2]), b"one", TIMEOUT
    )


CONTRACT: tuple[Callable[[Transfer], Awaitable[None]], ...] = (
    write_lands_before_its_notification,
    read_fetches_the_peers_bytes,
    notifications_keep_their_order,
    both_ends_may_begin,
    a_peer_that_fenced_is_lost,
    stale_metadata_reaches_nobody,
    a_fenced_agent_refuses_everything,
    a_fence_leaves_other_agents_alone,
    ranges_outside_of_the_regions_are_refused,
    what_was_done_is_counted,
    a_stranger_is_not_reached,
)
