"""The transfer interface: one-sided reads and writes between the arenas of two processes.

What holds for every implementation, and for NIXL was measured:

- A write lands in the peer's memory without asking it. Nothing but the peer's own process, by
  destroying its agent, can stop a write that is under way.
- Giving up waiting is not cancelling. After `TransferTimeout` the operation is still in flight, and
  its memory may be touched until the agent's `fence` returned.
- A notification arrives after the bytes of the operation that carries it, or never.
- An agent is one fault domain: a fence ends all operations of that agent, and no others.

All methods are called from, and all callbacks arrive on, the event loop's thread; implementations
with a thread of their own hand over. Arenas are registered at `open` and never freed, moved or
deregistered while the process lives, except by `fence` and `close`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#                 TransferError
#                /      |      \
#        PeerLost  TransferTimeout  AgentClosed


class TransferError(Exception):
    """A transfer did not complete."""


class PeerLost(TransferError):  # noqa: N818 - it names the event, as in NIXL
    """The peer cannot be reached or its process ended. What was written of the bytes is unknown."""


class TransferTimeout(TransferError):  # noqa: N818
    """The deadline passed with the operation still in flight: fence before reusing its memory."""


class AgentClosed(TransferError):  # noqa: N818
    """The agent was fenced or closed; the operation has stopped for good."""


Ranges: TypeAlias = "NDArray[np.uint64]"
"""Memory ranges, shape (n, 2): absolute address, bytes."""
OnNotify: TypeAlias = Callable[[bytes], None]
"""Called with the payload of each notification, unauthenticated: decode it strictly."""


@dataclass(frozen=True, slots=True)
class Region:
    """An arena: `nbytes` bytes of memory at `address`. `device`: None for host, else CUDA index."""

    address: int
    nbytes: int
    device: int | None = None


class Agent(ABC):
    """One fault domain's end of the data path."""

    name: str
    metadata: bytes
    """What a peer's `connect` needs. Of no use after this agent's fence or the process's end."""

    @abstractmethod
    async def connect(self, metadata: bytes, timeout: float) -> str:  # noqa: ASYNC109
        """Load a peer's metadata and return the peer's name. Raises PeerLost."""

    @abstractmethod
    async def disconnect(self, peer: str) -> None:
        """Forget a peer. Cancels nothing that is in flight."""

    @abstractmethod
    async def write(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        notification: bytes,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """Copy local ranges into the peer's, pairwise; return when the bytes lie there.

        The notification follows the bytes. Raises PeerLost, TransferTimeout, AgentClosed.
        """

    @abstractmethod
    async def read(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """Copy the peer's ranges into local ones, pairwise. Raises as `write`."""

    @abstractmethod
    async def notify(self, peer: str, notification: bytes) -> None:
        """Send a notification alone. Raises PeerLost, AgentClosed."""

    @abstractmethod
    async def fence(self) -> None:
        """Destroy the agent, and with it every operation under way.

        When this returns, neither its own operations nor a peer's write through it touch memory
        any more; waiting operations raise AgentClosed. This is also how an agent is closed.
        Idempotent.
        """


class Transfer(ABC):
    """One process's access to the data path; opens agents."""

    @abstractmethod
    async def open(self, name: str, regions: list[Region], on_notify: OnNotify) -> Agent:
        """Open an agent over `regions`. `name` is unique in the cluster: it holds a boot_id."""

    @abstractmethod
    async def close(self) -> None:
        """Fence every agent and stop."""
