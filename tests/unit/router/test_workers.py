"""The fleet on fake workers: the index follows events, groups are announced, routing uses both."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from msgspec import structs

from penstock_router.discovery import Endpoint
from penstock_router.policy import Demand
from penstock_router.prefix_index import PrefixIndex
from penstock_router.workers import Fleet, Prompt
from penstock_wire.blocks import block_hashes, root_hash
from penstock_wire.messages import Hello, KvEvents, Snapshot, Subscribe, pack_tokens
from penstock_wire.sockets import LinkDown, LinkState
from tests.unit.router.fake_worker import (
    PAGE_SIZE,
    FakeCluster,
    FakeWorker,
    decode_worker,
    groups_sent,
    prefill_worker,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKENS = pack_tokens(list(range(40)))
HASHES = block_hashes(root_hash("digest"), TOKENS, PAGE_SIZE)
DEMAND = Demand(prompt_tokens=40, max_output=10)


@asynccontextmanager
async def fleet_of(
    cluster: FakeCluster, *, require_prefill: bool = False, group_wait: float = 10.0
) -> AsyncIterator[Fleet]:
    fleet = Fleet(
        cluster,
        cluster.connect,
        hello=Hello(role="router", name="router", boot_id="r"),
        index=PrefixIndex(time.monotonic),
        rng=random.Random(1),
        require_prefill=require_prefill,
        group_wait=group_wait,
    )
    task = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await fleet.close()


async def settle(fleet: Fleet, ready: int) -> None:
    async with asyncio.timeout(5):
        while len([w for w in fleet.workers if w.ready]) != ready:
            await fleet.changed(0.05)


def joined(*numbers: int) -> bytes:
    return b"".join(HASHES[n] for n in numbers)


def subscriptions(worker: FakeWorker) -> int:
    return sum(isinstance(message, Subscribe) for message in worker.received)


async def test_events_move_the_index_and_a_gap_asks_for_a_snapshot() -> None:
    worker = decode_worker(snapshot=Snapshot(seq=5, hashes=joined(0, 1)))
    async with fleet_of(FakeCluster(worker)) as fleet:
        await settle(fleet, 1)
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 2}
        worker.publish(KvEvents(seq=5, stored=joined(2)))  # the snapshot includes it
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 2}
        worker.publish(KvEvents(seq=6, stored=joined(2, 3)))
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 4}
        worker.publish(KvEvents(seq=7, evicted=joined(1)))
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 1}
        before = subscriptions(worker)
        worker.snapshot = Snapshot(seq=20, hashes=joined(0, 1, 2))
        worker.publish(KvEvents(seq=19, stored=joined(9)))
        worker.publish(KvEvents(seq=20, stored=joined(8)))
        await worker.until(lambda: subscriptions(worker) == before + 1)
        await fleet.changed(1)
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 3}
        assert fleet.index.blocks_of("decode-0") == 3


async def test_a_malformed_event_is_left_out() -> None:
    worker = decode_worker(snapshot=Snapshot(seq=0, hashes=joined(0)))
    async with fleet_of(FakeCluster(worker)) as fleet:
        await settle(fleet, 1)
        worker.publish(KvEvents(seq=1, stored=b"short"))
        worker.publish(KvEvents(seq=2, stored=joined(1)))
        assert fleet.index.longest_prefix(HASHES) == {"decode-0": 2}


async def test_a_restarted_worker_starts_without_blocks() -> None:
    worker = decode_worker(snapshot=Snapshot(seq=3, hashes=joined(0, 1)))
    async with fleet_of(FakeCluster(worker)) as fleet:
        await settle(fleet, 1)
        worker.kill()
        assert fleet.decode_workers() == []
        worker.snapshot = Snapshot(seq=0, hashes=b"")
        worker.restart()
        await settle(fleet, 1)
        assert fleet.index.longest_prefix(HASHES) == {}


async def test_a_prompt_follows_its_prefix_and_a_burst_its_first() -> None:
    workers = [decode_worker(f"decode-{n}") for n in range(3)]
    workers[1].snapshot = Snapshot(seq=0, hashes=b"".join(HASHES[:9]))
    for worker in workers:
        assert worker.load.cost is not None
        slow = structs.replace(worker.load.cost, b=0.1)
        worker.load = structs.replace(worker.load, cost=slow)
    async with fleet_of(FakeCluster(*workers)) as fleet:
        await settle(fleet, 3)
        choice = fleet.choose(Prompt(TOKENS), DEMAND, avoid=())
        assert choice is not None
        assert (choice.decode, choice.cached_tokens) == ("decode-1", 36)
        other = pack_tokens(list(range(100, 140)))
        first = fleet.choose(Prompt(other), DEMAND, avoid=())
        assert first is not None
        fleet.worker(first.decode).routed_seconds = 0.0
        second = fleet.choose(Prompt(other), DEMAND, avoid=())
        assert second is not None
        assert second.decode == first.decode
        assert second.cached_tokens == 39
        elsewhere = fleet.choose(Prompt(other), DEMAND, avoid={first.decode})
        assert elsewhere is not None
        assert elsewhere.decode != first.decode
        salted = fleet.choose(Prompt(other, b"tenant"), DEMAND, avoid=())
        assert salted is not None
        assert salted.cached_tokens == 0


async def test_a_load_clears_what_was_routed_before_it() -> None:
    worker = decode_worker()
    async with fleet_of(FakeCluster(worker)) as fleet:
        await settle(fleet, 1)
        fleet.choose(Prompt(TOKENS), DEMAND, avoid=())
        record = fleet.worker("decode-0")
        assert (record.routed, record.routed_pages) == (1, 13)
        assert record.routed_seconds > 0
        worker.publish(worker.load)
        assert (record.routed, record.routed_pages, record.routed_seconds) == (0, 0, 0.0)


async def test_only_whole_groups_are_announced() -> None:
    decode = decode_worker()
    stage_0 = prefill_worker("g", stages=2)
    stage_1 = FakeWorker(
        Endpoint(name="g-1", role="prefill", address="g-1:7000", group="g", stage=1)
    )
    cluster = FakeCluster(decode, stage_0)
    async with fleet_of(cluster) as fleet:
        await settle(fleet, 2)
        assert groups_sent(decode)[-1] == ()
        cluster.list(decode, stage_0, stage_1)
        await decode.until(lambda: groups_sent(decode)[-1] == ("g",))
        assert stage_1.links == []  # the router talks to stage 0 only
        stage_0.kill()
        cluster.list(decode, stage_0, stage_1)
        await asyncio.sleep(0)
        assert groups_sent(decode)[-1] == ("g",)
        cluster.list(decode, stage_1)
        await decode.until(lambda: groups_sent(decode)[-1] == ())


async def test_the_hello_is_renewed_when_a_worker_has_loaded() -> None:
    worker = decode_worker(pages=0)
    worker.load = structs.replace(worker.load, state="starting")
    async with fleet_of(FakeCluster(worker)) as fleet:
        async with asyncio.timeout(5):
            while not fleet.workers or fleet.workers[0].load is None:
                await fleet.changed(0.05)
        assert fleet.decode_workers() == []
        worker.pages = 50
        worker.load = structs.replace(worker.load, state="ready")
        before = subscriptions(worker)
        worker.publish(worker.load)
        await worker.until(lambda: any(isinstance(m, Hello) for m in worker.received))
        await worker.until(lambda: subscriptions(worker) == before + 1)


async def test_a_draining_worker_gets_nothing_new() -> None:
    worker = decode_worker()
    async with fleet_of(FakeCluster(worker)) as fleet:
        await settle(fleet, 1)
        for link in worker.links:
            link.change(LinkState.DRAINING)
        assert fleet.choose(Prompt(TOKENS), DEMAND, avoid=()) is None
        with pytest.raises(LinkDown):
            fleet.worker("nobody")


async def test_the_context_limit_is_what_fits_everywhere() -> None:
    small = decode_worker("decode-1", max_model_len=0)
    small.load = structs.replace(small.load, pages_total=20)
    async with fleet_of(FakeCluster(decode_worker(), small)) as fleet:
        assert fleet.context_limit() is None
        await settle(fleet, 2)
        assert fleet.context_limit() == 20 * PAGE_SIZE


async def test_without_a_group_for_long_prompts_go_to_decode_workers_alone() -> None:
    decode, group = decode_worker(groups=("group-0",)), prefill_worker("group-0")
    async with fleet_of(FakeCluster(decode, group), require_prefill=True, group_wait=0.3) as fleet:
        await settle(fleet, 2)
        assert fleet.alone_at() is None
        group.kill()
        await settle(fleet, 1)
        assert fleet.choose(Prompt(TOKENS), DEMAND, avoid=()) is None, "it may come back"
        alone_at = fleet.alone_at()
        assert alone_at is not None
        await asyncio.sleep(alone_at - time.monotonic())
        choice = fleet.choose(Prompt(TOKENS), DEMAND, avoid=())
        assert choice is not None
        assert (choice.decode, choice.group) == ("decode-0", "")
        group.restart()
        await settle(fleet, 2)
        assert fleet.alone_at() is None
        choice = fleet.choose(Prompt(TOKENS), DEMAND, avoid=())
        assert choice is not None
        assert choice.group == "group-0"
