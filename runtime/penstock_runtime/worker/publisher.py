"""KV events and load, to every router that subscribed.

Whoever changes something says so, and what has changed goes out a few times a second, or at once
when the worker's state changes. A router that saw a gap subscribes again and gets a new snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock_wire.rhythm import until_next
from penstock_wire.sockets import LinkDown, Session

if TYPE_CHECKING:
    from penstock_wire.messages import KvEvents, Load, Message, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class PublisherSettings:
    """Pace, in seconds."""

    interval_seconds: float = 0.1
    """Between two looks while things change: what a routing decision may be behind by. Not at once
    upon the first change: a router takes a Load to include all that it has sent until then."""
    idle_seconds: float = 1.0
    """Between two looks when nobody has said that something changed. Heartbeats wake the process
    at the same moments, so this net costs nothing."""


class Source(Protocol):
    """Where events and load come from: a leader or a decode engine."""

    def events(self) -> KvEvents | Snapshot | None:
        """Return what changed since the last call."""
        ...

    def snapshot(self) -> Snapshot:
        """Return all blocks, as of the last events."""
        ...


class Publisher:
    """Sends to subscribed sessions; `load` is asked for the current Load."""

    def __init__(self, source: Source, settings: PublisherSettings | None = None) -> None:
        self._source = source
        self._settings = settings or PublisherSettings()
        self._subscribers: set[Session] = set()
        self._last: Load | None = None
        self._changed = asyncio.Event()

    def subscribe(self, session: Session, load: Load) -> None:
        """Send a snapshot and the load now, and events from here on."""
        self.publish(None)
        self._subscribers.add(session)
        self._send(session, self._source.snapshot())
        self._send(session, load)

    def unsubscribe(self, session: Session) -> None:
        """The session is gone."""
        self._subscribers.discard(session)

    def publish(self, load: Load | None) -> None:
        """Send pending events, and the load if it changed."""
        events = self._source.events()
        changed = load is not None and load != self._last
        for session in list(self._subscribers):
            if events is not None:
                self._send(session, events)
            if load is not None and changed:
                self._send(session, load)
        if load is not None:
            self._last = load

    def _send(self, session: Session, message: Message) -> None:
        with contextlib.suppress(LinkDown):
            session.send(message)

    def changed(self) -> None:
        """Events or the load may have changed: look within `interval_seconds`."""
        self._changed.set()

    async def run(self, load: LoadNow) -> None:
        """Publish for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_next(self._settings.idle_seconds)):
                    await self._changed.wait()
                    await asyncio.sleep(until_next(self._settings.interval_seconds))
            self._changed.clear()
            self.publish(load())


class LoadNow(Protocol):
    """Returns the current load."""

    def __call__(self) -> Load:
        """Return it."""
        ...
