"""What routers are told, and when."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

from penstock_runtime.worker.publisher import Publisher, PublisherSettings
from penstock_wire.messages import KvEvents, Load, Message, Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_wire.sockets import Session

ONLY_WHEN_TOLD = PublisherSettings(interval_seconds=0.01, idle_seconds=3600)
UNTOLD = PublisherSettings(interval_seconds=0.01, idle_seconds=0.02)
SNAPSHOT = Snapshot(seq=0, hashes=b"")


class Worker:
    """A source of events, its load, and a router that hears of both."""

    def __init__(self, settings: PublisherSettings) -> None:
        self.load = Load(state="ready")
        self.pending: KvEvents | None = None
        self.publisher = Publisher(self, settings)
        self._heard: asyncio.Queue[Message] = asyncio.Queue()

    def events(self) -> KvEvents | None:
        pending, self.pending = self.pending, None
        return pending

    def snapshot(self) -> Snapshot:
        return SNAPSHOT

    def send(self, message: Message) -> None:
        self._heard.put_nowait(message)

    async def heard(self) -> Message:
        return await asyncio.wait_for(self._heard.get(), 5)


@asynccontextmanager
async def publishing(settings: PublisherSettings) -> AsyncIterator[Worker]:
    worker = Worker(settings)
    running = asyncio.create_task(worker.publisher.run(lambda: worker.load))
    worker.publisher.subscribe(cast("Session", worker), worker.load)
    try:
        assert [await worker.heard(), await worker.heard()] == [SNAPSHOT, worker.load]
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_changed_is_published_when_somebody_says_so() -> None:
    async with publishing(ONLY_WHEN_TOLD) as worker:
        for running in range(1, 4):
            worker.load = Load(state="ready", running=running)
            worker.pending = KvEvents(seq=running)
            worker.publisher.changed()
            assert await worker.heard() == KvEvents(seq=running)
            assert await worker.heard() == worker.load


async def test_what_nobody_told_of_is_published_all_the_same() -> None:
    async with publishing(UNTOLD) as worker:
        worker.load = Load(state="draining")
        assert await worker.heard() == worker.load
