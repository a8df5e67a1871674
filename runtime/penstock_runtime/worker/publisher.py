"""KV events and load, to every router that subscribed.

Events go out as they come, load a few times a second and at once when the worker's state changes.
A router that saw a gap subscribes again and gets a new snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock_wire.sockets import LinkDown, Session

if TYPE_CHECKING:
    from penstock_wire.messages import KvEvents, Load, Message, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class PublisherSettings:
    """Pace, in seconds."""

    interval_seconds: float = 0.1
    """Between two looks for events and load: what a routing decision may be behind by."""


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

    async def run(self, load: LoadNow) -> None:
        """Publish for ever."""
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            self.publish(load())


class LoadNow(Protocol):
    """Returns the current load."""

    def __call__(self) -> Load:
        """Return it."""
        ...
