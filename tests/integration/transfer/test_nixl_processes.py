"""What the ownership rules take for granted, on real processes: deaths, pauses, fences.

To be in the middle of a write for certain, a test stops the target first: what the kernel's buffers
hold is then on its way, and the rest waits in the initiator.
"""

from __future__ import annotations

import asyncio
import random
import signal
import zlib
from functools import partial
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.base import AgentClosed, PeerLost, TransferTimeout
from tests.integration.transfer.processes import DEADLINE, End, Process, processes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.timeout(120)

PAGES = 256
PAGE_BYTES = 128 * 1024
"""32 MiB in all: more than the kernel buffers of a connection, so a stopped target blocks it."""
ZERO_PAGE = zlib.crc32(bytes(PAGE_BYTES))


async def linked(source: Process, target: Process) -> tuple[End, End]:
    """Return a source of random bytes with a proven link to a target of zeros."""
    here = await End.open(source, "source/1", PAGES, PAGE_BYTES, seed=5)
    there = await End.open(target, "target/1", PAGES, PAGE_BYTES)
    await here.connect(there)
    await prove(here, there)
    return here, there


async def prove(here: End, there: End) -> None:
    """A notification goes round: the connection stands."""
    await here.notify(there, b"nonce")
    assert await there.notified() == b"nonce"


async def outcome(future: asyncio.Future[object]) -> object:
    return await asyncio.wait_for(future, DEADLINE)


async def begun(here: End, there: End) -> asyncio.Future[object]:
    """Begin to write everything to a stopped target, and return when it is in flight."""
    write = here.write(there)
    await until(here.in_flight)
    return write


async def until(look: Callable[[], Awaitable[int]]) -> None:
    """Ask another process until it says more than zero; it has no event to await."""
    async with asyncio.timeout(DEADLINE):
        while not await look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def changed(checksums: list[int]) -> int:
    return sum(checksum != ZERO_PAGE for checksum in checksums)


async def landed(there: End) -> int:
    """Return how many pages are not zeros any more."""
    return changed(await there.checksums())


async def test_random_pages_arrive_and_come_back() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        rng = random.Random(1)
        sums = await here.checksums()
        expected = [ZERO_PAGE] * PAGES
        for number in range(6):
            n = rng.randint(1, 40)
            sources, targets = rng.sample(range(PAGES), n), rng.sample(range(PAGES), n)
            write = here.write(there, sources, targets, b"%d" % number)
            assert await there.notified() == b"%d" % number
            for source, target in zip(sources, targets, strict=True):
                expected[target] = sums[source]
            assert await there.checksums() == expected
            await outcome(write)
        await outcome(here.read(there, here=range(PAGES), there=range(PAGES)))
        assert await here.checksums() == expected
        await one.leave()
        await two.leave()


async def test_done_means_that_the_target_has_the_bytes() -> None:
    """Acknowledging a revocation rests on this: bytes in a kernel buffer are not done."""
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        with pytest.raises(TransferTimeout):
            await outcome(here.write(there, [0], [0], seconds=1.0))
        two.signal(signal.SIGCONT)


async def test_a_killed_target_is_lost() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        write = await begun(here, there)
        await two.kill()
        with pytest.raises(PeerLost):
            await outcome(write)
        with pytest.raises(PeerLost):
            await here.notify(there, b"anybody?")
        assert await here.in_flight() == 0
        await one.leave()


async def test_bytes_of_a_killed_initiator_land_until_the_fence() -> None:
    async with processes(3) as (one, two, three):
        here, there = await linked(one, two)
        written = await here.checksums()
        two.signal(signal.SIGSTOP)
        await begun(here, there)
        await one.kill()
        two.signal(signal.SIGCONT)
        # The dead process's bytes come out of the kernel's buffers: its end frees no page.
        await until(partial(landed, there))
        await there.fence()
        fenced = await there.checksums()
        assert 0 < changed(fenced) < PAGES
        assert there.is_silent()

        successor = await there.reopen("target/2")
        other = await End.open(three, "source/2", PAGES, PAGE_BYTES, seed=5)
        await other.connect(successor)
        await outcome(other.write(successor, [0, 1], [9, 8]))
        assert await successor.notified() == b"written"
        fenced[9], fenced[8] = written[0], written[1]
        assert await successor.checksums() == fenced
        await two.leave()
        await three.leave()


async def test_no_byte_of_a_stopped_initiator_lands_after_a_fence() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        write = await begun(here, there)
        one.signal(signal.SIGSTOP)
        two.signal(signal.SIGCONT)
        await until(partial(landed, there))
        await there.fence()
        fenced = await there.checksums()
        one.signal(signal.SIGCONT)
        with pytest.raises(PeerLost):
            await outcome(write)
        assert changed(fenced) < PAGES
        assert await there.checksums() == fenced
        assert there.is_silent()
        await relinked(here, there)
        await one.leave()
        await two.leave()


async def relinked(here: End, there: End) -> None:
    """The same processes go on over a new incarnation of the target's agent."""
    successor = await there.reopen("target/2")
    await here.process.call("disconnect", agent=here.name, peer=there.name)
    await here.connect(successor)
    await outcome(here.write(successor))
    assert await successor.notified() == b"written"
    assert await successor.checksums() == await here.checksums()


async def test_a_stopped_target_takes_everything_when_it_goes_on() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        write = await begun(here, there)
        two.signal(signal.SIGCONT)
        await outcome(write)
        assert await there.notified() == b"written"
        assert await there.checksums() == await here.checksums()


async def test_after_a_timeout_only_the_fence_makes_the_source_reusable() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        await one.call("fill", arena=here.arena, value=1)
        two.signal(signal.SIGSTOP)
        with pytest.raises(TransferTimeout):
            await outcome(here.write(there, seconds=0.5))
        assert await here.in_flight() == 1
        await here.fence()
        await one.call("fill", arena=here.arena, value=2)
        two.signal(signal.SIGCONT)
        successor = await here.reopen("source/2")
        await successor.connect(there)
        await prove(successor, there)
        assert await two.call("values", arena=there.arena) == [0, 1]
        assert there.is_silent()
        await one.leave()
        await two.leave()


async def test_a_waiting_write_ends_with_the_own_fence() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        write = await begun(here, there)
        await here.fence()
        with pytest.raises(AgentClosed):
            await outcome(write)
        two.signal(signal.SIGCONT)
        await one.leave()


async def test_a_fence_ends_the_reads_of_its_memory() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        two.signal(signal.SIGSTOP)
        reading = here.read(there, here=range(PAGES), there=range(PAGES))
        await until(here.in_flight)
        one.signal(signal.SIGSTOP)
        two.signal(signal.SIGCONT)
        await there.fence()
        one.signal(signal.SIGCONT)
        with pytest.raises(PeerLost):
            await outcome(reading)
        assert await here.in_flight() == 0


async def test_a_fence_leaves_the_other_agents_of_the_process_alone() -> None:
    async with processes(3) as (one, two, target):
        first, fenced = await linked(one, target)
        second = await End.open(two, "source/b", PAGES, PAGE_BYTES, seed=6)
        kept = await End.open(target, "target/b", PAGES, PAGE_BYTES)
        await second.connect(kept)
        await prove(second, kept)
        target.signal(signal.SIGSTOP)
        cut = await begun(first, fenced)
        whole = await begun(second, kept)
        one.signal(signal.SIGSTOP)
        fence = target.begin("fence", agent=fenced.name)
        target.signal(signal.SIGCONT)
        await outcome(fence)
        after = await fenced.checksums()
        one.signal(signal.SIGCONT)
        await outcome(whole)
        assert await kept.notified() == b"written"
        assert await kept.checksums() == await second.checksums()
        with pytest.raises(PeerLost):
            await outcome(cut)
        assert await fenced.checksums() == after


async def test_a_restarted_peer_is_reached_by_its_new_metadata_only() -> None:
    async with processes(2) as (one, two):
        here, there = await linked(one, two)
        await two.kill()
        async with processes(1) as (reborn,):
            # The same place in memory is likely: nothing but the metadata tells the two apart.
            successor = await End.open(reborn, "target/2", PAGES, PAGE_BYTES)
            with pytest.raises(PeerLost):
                await outcome(here.write(there, [0], [0]))
            with pytest.raises(PeerLost):
                await reach(here, there)
            await here.connect(successor)
            await prove(here, successor)
            await outcome(here.write(successor, [3], [4]))
            assert await successor.notified() == b"written"
            assert await landed(successor) == 1
            await reborn.leave()


async def reach(here: End, gone: End) -> None:
    """Connect by stale metadata, and use it."""
    await here.connect(gone)
    await here.notify(gone, b"nonce")
    await outcome(here.write(gone, [1], [1]))
