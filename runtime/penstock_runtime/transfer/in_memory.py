"""The transfer interface inside one process, for tests: a fabric whose every fault can be chosen.

Operations copy in pieces, one a turn of the event loop, so that a fence visibly cuts them. A test
decides how far they get (`hold`), stops a peer as SIGSTOP would (`pause`), or ends one as SIGKILL
would, with bytes still under way (`crash`).
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.transfer.base import (
    Agent,
    AgentClosed,
    OnNotify,
    PeerLost,
    Region,
    Transfer,
    TransferTimeout,
)
from penstock_runtime.transfer.metadata import (
    AgentMetadata,
    OutsideRegionsError,
    check_pairs,
    devices_of,
)
from penstock_runtime.transfer.stats import AgentStats

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from penstock_runtime.transfer.base import Ranges


class Fabric:
    """The network between the agents of one process.

    Args:
        piece_bytes: An operation moves this many bytes, of one range, a turn.
    """

    def __init__(self, piece_bytes: int = 64 * 1024) -> None:
        self.piece_bytes = piece_bytes
        self._agents: dict[str, InMemoryAgent] = {}
        self._paused: set[str] = set()
        self._allowance: dict[str, int] = {}
        """Initiators that are held → pieces that may still move."""
        self._changed = asyncio.Event()

    # --- faults -------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """Stop an agent as SIGSTOP does: nothing moves from it or to it."""
        self._paused.add(name)

    def resume(self, name: str) -> None:
        """Let a paused agent go on; notifications that waited for it arrive."""
        self._paused.discard(name)
        self._wake()

    def hold(self, name: str, pieces: int = 0) -> None:
        """Let operations that `name` began move only this many further pieces."""
        self._allowance[name] = pieces
        self._wake()

    def unhold(self, name: str) -> None:
        """End `hold`."""
        self._allowance.pop(name, None)
        self._wake()

    def crash(self, name: str, pieces: int = 0) -> None:
        """End an agent as SIGKILL does. Operations towards it fail with PeerLost.

        Args:
            name: The agent that ends.
            pieces: How many pieces of its own operations the kernel has already: they still land,
                without a notification, once their target runs.
        """
        self._agents.pop(name).crashed = True
        self._allowance[name] = pieces
        self._paused.discard(name)
        self._wake()

    # --- what agents do -----------------------------------------------------------------------

    def enter(self, agent: InMemoryAgent) -> None:
        """An agent opens. Raises ValueError if the name was not unique."""
        if agent.name in self._agents:
            raise ValueError(f"agent name {agent.name} is in use")
        self._agents[agent.name] = agent

    def leave(self, agent: InMemoryAgent) -> None:
        """An agent is fenced: whatever moved from it or to it has stopped."""
        if self._agents.get(agent.name) is agent:
            del self._agents[agent.name]
        self._wake()

    def find(self, peer: AgentMetadata) -> InMemoryAgent:
        """Return the agent with this very metadata. Raises PeerLost if it is gone or another."""
        agent = self._agents.get(peer.name)
        if agent is None or agent.token != peer.endpoint:
            raise PeerLost(f"{peer.name} is gone, or was restarted: its metadata is stale")
        return agent

    async def turn(self, initiator: InMemoryAgent, peer: AgentMetadata) -> None:
        """Wait until a piece may move between the two, and count it as moved.

        Raises AgentClosed or PeerLost as soon as one of them is gone.
        """
        await asyncio.sleep(0)
        while True:
            self._check_ends(initiator, peer)
            left = self._allowance.get(initiator.name, 1)
            if left > 0 and not {initiator.name, peer.name} & self._paused:
                break
            await self._changed.wait()
        if initiator.name in self._allowance:
            self._allowance[initiator.name] -= 1

    def _check_ends(self, initiator: InMemoryAgent, peer: AgentMetadata) -> None:
        if initiator.closed:
            raise AgentClosed(f"agent {initiator.name} was fenced")
        if initiator.crashed and not self._allowance[initiator.name]:
            raise PeerLost(f"{initiator.name} crashed")
        self.find(peer)

    async def awake(self, agent: InMemoryAgent) -> None:
        """Wait until this agent is not paused, or is gone."""
        while agent.name in self._paused and not agent.closed:
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, slots=True)
class _Copy:
    """One operation: pairs of (destination, source, bytes)."""

    peer: AgentMetadata
    pairs: tuple[tuple[int, int, int], ...]
    notification: bytes

    def pieces(self, size: int) -> Iterator[tuple[int, int, int]]:
        for destination, source, nbytes in self.pairs:
            for offset in range(0, nbytes, size):
                yield destination + offset, source + offset, min(size, nbytes - offset)


class InMemoryAgent(Agent):
    """One end of the in-memory data path."""

    def __init__(
        self, fabric: Fabric, name: str, regions: list[Region], on_notify: OnNotify
    ) -> None:
        self.name = name
        self.regions = regions
        self.token = secrets.token_bytes(16)
        self.metadata = AgentMetadata(name, regions, self.token).encode()
        self.crashed = False
        self.closed = False
        self.stats = AgentStats()
        self._fabric = fabric
        self._on_notify = on_notify
        self._peers: dict[str, AgentMetadata] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        fabric.enter(self)

    async def connect(self, metadata: bytes, timeout: float) -> str:  # noqa: ARG002, ASYNC109
        """See `Agent.connect`."""
        self._check_open()
        peer = AgentMetadata.decode(metadata)
        self._fabric.find(peer)
        self._peers[peer.name] = peer
        return peer.name

    async def disconnect(self, peer: str) -> None:
        """See `Agent.disconnect`."""
        self._peers.pop(peer, None)

    async def write(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        notification: bytes,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """See `Agent.write`."""
        nbytes = check_pairs(local, remote)
        await self._copy(peer, local, remote, notification, timeout, write=True)
        self.stats.bytes_written += nbytes

    async def read(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """See `Agent.read`."""
        nbytes = check_pairs(local, remote)
        await self._copy(peer, local, remote, b"", timeout, write=False)
        self.stats.bytes_read += nbytes

    async def notify(self, peer: str, notification: bytes) -> None:
        """See `Agent.notify`."""
        self._check_open()
        target = self._fabric.find(self._peer(peer))
        self.stats.notifications_sent += 1
        target.receive(notification)

    async def fence(self) -> None:
        """See `Agent.fence`."""
        if self.closed:
            return
        self.closed = True
        self._fabric.leave(self)
        # No task touches memory once `closed` is set; waiting for them only leaves nothing behind.
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def receive(self, notification: bytes) -> None:
        """A notification came in; it is handed on in a later turn, once this agent runs."""
        self._spawn(self._deliver(notification))

    async def _deliver(self, notification: bytes) -> None:
        await self._fabric.awake(self)
        if not self.closed and not self.crashed:
            self.stats.notifications_received += 1
            self._on_notify(notification)

    def _peer(self, name: str) -> AgentMetadata:
        peer = self._peers.get(name)
        if peer is None:
            raise PeerLost(f"{name} is not connected")
        return peer

    def _check_open(self) -> None:
        if self.closed:
            raise AgentClosed(f"agent {self.name} was fenced")

    async def _copy(
        self,
        peer_name: str,
        local: Ranges,
        remote: Ranges,
        notification: bytes,
        timeout: float,  # noqa: ASYNC109
        *,
        write: bool,
    ) -> None:
        self._check_open()
        peer = self._peer(peer_name)
        devices_of(local, self.regions)
        try:
            devices_of(remote, peer.regions)
        except OutsideRegionsError as error:
            raise PeerLost(f"{peer_name}: {error}") from error
        destination, source = (remote, local) if write else (local, remote)
        pairs = zip(destination[:, 0].tolist(), source[:, 0].tolist(), local[:, 1].tolist())  # noqa: B905
        task = self._spawn(self._run(_Copy(peer, tuple(pairs), notification)))
        self.stats.in_flight += 1
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if not done:
            self.stats.timed_out += 1
            raise TransferTimeout(
                f"a copy with {peer_name} is still in flight after {timeout} s: fence {self.name}"
            )
        await task

    async def _run(self, copy: _Copy) -> None:
        """Copy piece by piece. Nothing is awaited between a turn's check and its copy."""
        try:
            for destination, source, nbytes in copy.pieces(self._fabric.piece_bytes):
                await self._fabric.turn(self, copy.peer)
                ctypes.memmove(destination, source, nbytes)
            if self.crashed:
                raise PeerLost(f"{self.name} crashed")
            target = self._fabric.find(copy.peer)
        except (AgentClosed, PeerLost):
            self.stats.failed += 1
            raise
        else:
            self.stats.done += 1
            if copy.notification:
                target.receive(copy.notification)
        finally:
            self.stats.in_flight -= 1

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Read the outcome: after a timeout nobody else does.
        if not task.cancelled():
            task.exception()


class InMemoryTransfer(Transfer):
    """One process's access to a fabric."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._agents: list[InMemoryAgent] = []

    async def open(self, name: str, regions: list[Region], on_notify: OnNotify) -> InMemoryAgent:
        """See `Transfer.open`."""
        agent = InMemoryAgent(self._fabric, name, regions, on_notify)
        self._agents.append(agent)
        return agent

    async def close(self) -> None:
        """See `Transfer.close`."""
        for agent in self._agents:
            await agent.fence()
        self._agents.clear()
