"""One NIXL agent, used by one thread only: operations, notifications, destruction.

NIXL is not safe for use by several threads, and nothing happens in it unless it is polled; both are
the business of `nixl.NixlThread`, which owns all endpoints of a process.
"""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from penstock_runtime.transfer.base import AgentClosed, PeerLost, TransferError, TransferTimeout
from penstock_runtime.transfer.metadata import AgentMetadata, OutsideRegionsError, devices_of
from penstock_runtime.transfer.sockets import event_sets
from penstock_runtime.transfer.stats import AgentStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.transfer.base import Ranges, Region

logger = logging.getLogger(__name__)


class NixlLibrary:
    """The NIXL package, imported when the first agent opens. Raises TransferError without it."""

    def __init__(self) -> None:
        try:
            from nixl import _api, _bindings  # noqa: PLC0415 - heavy, and its environment is first
        except ImportError as error:
            raise TransferError(
                "the NIXL package cannot be loaded: install penstock's `runtime` extra "
                f"(nixl) ({error})"
            ) from error
        self.agent = _api.nixl_agent
        self.config = _api.nixl_agent_config
        found = [v for name, v in vars(_bindings).items() if name.endswith("Error")]
        self.errors: tuple[type[Exception], ...] = tuple(
            v for v in found if isinstance(v, type) and issubclass(v, Exception)
        )
        """Everything that NIXL raises; failures are exceptions, never a status."""


@dataclass(slots=True, eq=False)
class Operation:
    """A read or write. `finish` is called once, with None or what went wrong."""

    kind: Literal["READ", "WRITE"]
    peer: str
    local: Ranges
    remote: Ranges
    nbytes: int
    notification: bytes
    timeout: float
    finish: Callable[[TransferError | None], None]
    deadline: float = 0.0
    handle: Any = None


@dataclass(slots=True)
class _Peer:
    metadata: AgentMetadata
    gone: str = ""
    """Why nothing new is begun with it. It is removed from NIXL when nothing is in flight."""
    in_flight: int = 0
    """Operations, those given up by a deadline included."""


class Endpoint:
    """A NIXL agent and what is in flight on it.

    Args:
        library: NIXL.
        name: unique for ever.
        regions: memory that peers may be told of.
        sockets_only: nothing but sockets moves its bytes, so that they can be waited for.
    """

    def __init__(
        self, library: NixlLibrary, name: str, regions: list[Region], *, sockets_only: bool = False
    ) -> None:
        self.name = name
        self.destroyed = False
        self.stats = AgentStats()
        self._errors = library.errors
        self._regions = regions
        self._peers: dict[str, _Peer] = {}
        self._operations: dict[Operation, None] = {}
        """Polled until they are done, fail or time out; in the order of their start."""
        self._abandoned: list[Operation] = []
        """Timed out: neither polled nor released, since releasing would not stop them."""
        known = event_sets() if sockets_only else frozenset()
        try:
            config = library.config(enable_prog_thread=False, backends=["UCX"])
            self._agent = library.agent(name, config)
            self._registered = [
                self._agent.register_memory([(r.address, r.nbytes, r.device or 0, "")], _kind(r))
                for r in regions
            ]
            endpoint: bytes = self._agent.get_agent_metadata()
        except self._errors as error:
            raise TransferError(f"agent {name} cannot be opened: {_text(error)}") from _bare(error)
        self.event_sets = event_sets() - known if sockets_only else frozenset()
        """Epoll sets of the agent's sockets; none: it has to be polled."""
        self.metadata = AgentMetadata(name, regions, endpoint).encode()

    def connect(self, metadata: bytes) -> str:
        """See `Agent.connect`."""
        self._check_open()
        peer = AgentMetadata.decode(metadata)
        self.disconnect(peer.name)
        if peer.name in self._peers:
            raise PeerLost(f"{peer.name}: operations of its last connection are still in flight")
        try:
            loaded = self._agent.add_remote_agent(peer.endpoint)
        except self._errors as error:
            raise PeerLost(f"{peer.name} cannot be connected: {_text(error)}") from _bare(error)
        name = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        if name != peer.name:
            self._agent.remove_remote_agent(name)
            raise PeerLost(f"metadata of {peer.name!r} leads to an agent named {name!r}")
        self._peers[name] = _Peer(peer)
        return name

    def disconnect(self, peer: str) -> None:
        """See `Agent.disconnect`. What is in flight goes on, or fails by itself."""
        if peer in self._peers:
            self._give_up(peer, "it was disconnected")

    def notify(self, peer: str, notification: bytes) -> None:
        """See `Agent.notify`."""
        self._known(peer)
        try:
            self._agent.send_notif(peer, notification)
        except self._errors as error:
            self._give_up(peer, _text(error))
            raise PeerLost(f"{peer} is lost: {_text(error)}") from _bare(error)
        self.stats.notifications_sent += 1

    def start(self, operation: Operation) -> None:
        """Post an operation. Its `finish` is called now or by a later `progress`."""
        try:
            self._post(operation)
        except TransferError as error:
            self.stats.failed += 1
            operation.finish(error)

    def progress(self) -> list[bytes]:
        """Move bytes, finish operations, and return the notifications that came in."""
        now = time.monotonic()
        for operation in list(self._operations):
            try:
                state = self._agent.check_xfer_state(operation.handle)
            except self._errors as error:
                self._lose(operation, error)
                continue
            if state == "DONE":
                self._done(operation)
            elif now > operation.deadline:
                self._abandon(operation)
        received = [
            payload for payloads in self._agent.get_new_notifs().values() for payload in payloads
        ]
        self.stats.notifications_received += len(received)
        return received

    @property
    def busy(self) -> bool:
        """Whether operations are in flight that polling moves."""
        return bool(self._operations or self._abandoned)

    def destroy(self) -> None:
        """End the agent and everything on it; when this returns no byte moves through it.

        Raises TransferError if NIXL's agent could not be ended: memory is then not safe.
        """
        cut = [*self._operations, *self._abandoned]
        self._operations.clear()
        self._abandoned.clear()
        self._peers.clear()
        for operation in cut:
            # A handle keeps the agent alive. Releasing it stops nothing, the end of the agent does.
            self._release(operation)
        for descriptors in self._registered:
            try:
                self._agent.deregister_memory(descriptors)
            except self._errors as error:
                logger.warning("agent %s: deregistering memory: %s", self.name, _text(error))
        self._registered.clear()
        ended = weakref.ref(self._agent.agent)
        self._agent.agent = None
        if ended() is not None:
            raise TransferError(
                f"agent {self.name} is still referenced and may still move bytes: "
                "end this process before its memory is used again"
            )
        self.destroyed = True
        self.stats.in_flight = 0
        self.stats.failed += len(cut)
        for operation in cut:
            operation.finish(AgentClosed(f"agent {self.name} was fenced"))

    # --- inside -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.destroyed:
            raise AgentClosed(f"agent {self.name} was fenced")

    def _known(self, peer: str) -> _Peer:
        self._check_open()
        known = self._peers.get(peer)
        if known is None:
            raise PeerLost(f"{peer} is not connected, or was lost")
        if known.gone:
            raise PeerLost(f"{peer} is lost: {known.gone}")
        return known

    def _give_up(self, peer: str, reason: str) -> None:
        """Begin nothing new with a peer, and remove it once nothing is in flight.

        Not before: NIXL would forget the operations, but go on moving their bytes.
        """
        known = self._peers[peer]
        known.gone = known.gone or reason
        if not known.in_flight:
            del self._peers[peer]
            self._agent.remove_remote_agent(peer)

    def _post(self, operation: Operation) -> None:
        known = self._known(operation.peer)
        local, local_kind = _descriptors(operation.local, self._regions)
        try:
            remote, remote_kind = _descriptors(operation.remote, known.metadata.regions)
        except OutsideRegionsError as error:
            raise PeerLost(f"{operation.peer}: {error}") from error
        try:
            operation.handle = self._agent.initialize_xfer(
                operation.kind,
                self._agent.get_xfer_descs(local, local_kind),
                self._agent.get_xfer_descs(remote, remote_kind),
                operation.peer,
                operation.notification,
            )
            operation.deadline = time.monotonic() + operation.timeout
            state = self._agent.transfer(operation.handle)
        except self._errors as error:
            self._release(operation)
            self._give_up(operation.peer, _text(error))
            raise PeerLost(f"{operation.peer} is lost: {_text(error)}") from _bare(error)
        known.in_flight += 1
        self.stats.in_flight += 1
        self._operations[operation] = None
        if state == "DONE":
            self._done(operation)

    def _done(self, operation: Operation) -> None:
        self._end(operation)
        self.stats.done += 1
        if operation.kind == "WRITE":
            self.stats.bytes_written += operation.nbytes
        else:
            self.stats.bytes_read += operation.nbytes
        operation.finish(None)

    def _lose(self, operation: Operation, error: Exception) -> None:
        """This operation failed. Others with the same peer end when NIXL says so of each."""
        self._peers[operation.peer].gone = _text(error)
        self._end(operation)
        self.stats.failed += 1
        operation.finish(PeerLost(f"{operation.peer} is lost: {_text(error)}"))

    def _abandon(self, operation: Operation) -> None:
        del self._operations[operation]
        self._abandoned.append(operation)
        self.stats.timed_out += 1
        operation.finish(
            TransferTimeout(
                f"{operation.nbytes} bytes with {operation.peer} are still in flight after "
                f"{operation.timeout:g} s: fence agent {self.name} before using their memory"
            )
        )

    def _end(self, operation: Operation) -> None:
        del self._operations[operation]
        self.stats.in_flight -= 1
        self._release(operation)
        known = self._peers[operation.peer]
        known.in_flight -= 1
        if known.gone:
            self._give_up(operation.peer, known.gone)

    def _release(self, operation: Operation) -> None:
        handle, operation.handle = operation.handle, None
        if handle is None:
            return
        try:
            handle.release()
        except self._errors as error:
            logger.warning("agent %s: releasing a handle: %s", self.name, _text(error))


def _kind(region: Region) -> str:
    return "DRAM" if region.device is None else "VRAM"


def _descriptors(ranges: Ranges, regions: tuple[Region, ...] | list[Region]) -> tuple[Any, str]:
    """Return NIXL's (n, 3) array of (address, bytes, device) and the kind of memory."""
    devices, on_device = devices_of(ranges, regions)
    return np.column_stack((ranges, devices)), "VRAM" if on_device else "DRAM"


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _bare(error: Exception) -> Exception:
    """Return the error without the frames it passed: they hold handles, and those the agent."""
    return error.with_traceback(None)
