"""Discovery: which workers there are, and where.

`Discovery` is what the fleet needs of it: a stream of whole lists, each replacing the one before.
On one machine that is a watched file; in a cluster it is a LIST followed by a WATCH.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import msgspec
from msgspec import Meta, Struct

from penstock_router.file_stamp import file_stamp
from penstock_wire.names import split_address
from penstock_wire.rhythm import until_next

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from penstock_router.file_stamp import Stamp

log = logging.getLogger(__name__)

_Text = Annotated[str, Meta(max_length=256)]


class Endpoint(Struct, frozen=True, kw_only=True):
    """One worker process, as discovery knows it before any connection."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    role: Literal["decode", "prefill"]
    address: _Text
    """host:port of its control server."""
    group: _Text = ""
    """Prefill group; empty for decode workers."""
    stage: Annotated[int, Meta(ge=0)] = 0
    revision: _Text = ""
    http: _Text = ""
    """host:port of its health and metrics; not used by the router."""


class _EndpointFile(Struct, frozen=True):
    endpoints: tuple[Endpoint, ...]


class Discovery(Protocol):
    """A stream of the workers that there are."""

    @property
    def problem(self) -> str:
        """Why the list may be old, or is not known at all; empty if it is current."""
        ...

    def watch(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        """Yield the whole list at first and after every change, for ever."""
        ...


class InvalidEndpoints(ValueError):  # noqa: N818 - it names the state
    """A list of endpoints that cannot be used; the message says why."""


def parse_endpoints(data: bytes) -> tuple[Endpoint, ...]:
    """Return the endpoints in a discovery file's content. Raises InvalidEndpoints."""
    try:
        endpoints = msgspec.json.decode(data, type=_EndpointFile).endpoints
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEndpoints(str(error)) from error
    names: set[str] = set()
    for endpoint in endpoints:
        if endpoint.name in names:
            raise InvalidEndpoints(f"the name {endpoint.name!r} is there twice")
        names.add(endpoint.name)
        if endpoint.role == "prefill" and not endpoint.group:
            raise InvalidEndpoints(f"the prefill worker {endpoint.name!r} has no group")
        try:
            split_address(endpoint.address)
        except ValueError as error:
            raise InvalidEndpoints(f"worker {endpoint.name!r}: {error}") from error
    return endpoints


class FileDiscovery:
    """Watches a JSON file `{"endpoints": [...]}` that its writer replaces atomically.

    A missing or unusable file keeps the last good list: a router must not drop its workers
    because somebody's write went wrong. A missing file is an empty list only at first.

    Args:
        path: the file.
        interval: seconds between two looks.
    """

    def __init__(self, path: Path, *, interval: float) -> None:
        self._path = path
        self._interval = interval
        self.problem = ""

    async def watch(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        """Yield the list at first (empty without a file) and after every change of it."""
        seen: object = None
        current: tuple[Endpoint, ...] | None = None
        while True:
            stamp = self._stamp()
            if current is None or stamp != seen:
                seen = stamp
                found = self._read()
                if found is None and current is None:
                    found = ()
                if found is not None and found != current:
                    current = found
                    yield found
            await asyncio.sleep(until_next(self._interval))

    def _stamp(self) -> Stamp | None:
        """Return what changes when the file is replaced or written; None without a file."""
        try:
            return file_stamp(self._path)
        except OSError:
            return None

    def _read(self) -> tuple[Endpoint, ...] | None:
        try:
            found = parse_endpoints(self._path.read_bytes())
        except FileNotFoundError:
            self.problem = f"the discovery file {self._path} is not there"
        except (OSError, InvalidEndpoints) as error:
            self.problem = f"the discovery file {self._path} is unusable: {error}"
        else:
            self.problem = ""
            return found
        log.warning("%s; workers stay as they were", self.problem)
        return None
