"""The activation ring: how a stage's hidden states reach the next stage.

Each stage owns a receive arena of `slots` slots and a send arena of the same shape. The n-th
hand-over of an epoch uses slot n mod slots in both; every stage counts for itself, since all carry
out the same plans in the same order. A stage WRITEs its output from the send slot into the next
stage's receive slot, with an Activations notification behind the bytes; the next stage copies it
out and returns a Credit, and only then is the slot written again.

An epoch has one agent. A new epoch fences it first, so a late write of a dead epoch cannot land in
a slot of the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock_runtime.engine.streams import HostStreams
from penstock_runtime.errors import PipelineBroken
from penstock_runtime.transfer.base import PeerLost, Region, TransferError
from penstock_wire import messages
from penstock_wire.messages import Activations, Credit, RingAddress, RingEcho, RingProbe, WireError
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Coroutine

    import torch

    from penstock_runtime.engine.streams import Streams
    from penstock_runtime.transfer.base import Agent, Transfer


@dataclass(frozen=True, kw_only=True, slots=True)
class RingSettings:
    """Waits of the ring, in seconds."""

    connect_seconds: float = 5.0
    """For the neighbours' answer to a nonce when an epoch is formed."""
    probe_seconds: float = 0.1
    """Between two nonces: the next stage may not have connected to us yet."""
    write_seconds: float = 30.0
    """For one step's activations to arrive. Longer than any hiccup: a stage that stays silent is
    noticed by its heartbeats long before."""


class ActivationRing:
    """One stage's two arenas and, for each epoch, its agent and neighbours.

    Args:
        transfer: opens the agent.
        name: name/boot_id of this stage; agents are called name/ring/epoch/random.
        receive: (slots, max_tokens, hidden), contiguous, never freed.
        send: the same shape.
        streams: of the device that both are on; None: the CPU.
    """

    def __init__(
        self,
        transfer: Transfer,
        name: str,
        receive: torch.Tensor,
        send: torch.Tensor,
        settings: RingSettings | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._transfer = transfer
        self._streams: Streams = streams or HostStreams()
        self._name = name
        self._receive = receive
        self._send = send
        self._settings = settings or RingSettings()
        self._slots = receive.shape[0]
        self._slot_bytes = receive[0].numel() * receive.element_size()
        self._agent: Agent | None = None
        self._epoch = 0
        self._broken = asyncio.Event()
        self._reset()

    def _reset(self) -> None:
        self._previous = ""
        self._next = ""
        self._next_base = 0
        self._arrived: dict[int, asyncio.Event] = {}
        self._received = 0
        self._sent = 0
        self._credited = -1
        self._credit = asyncio.Event()
        self._echoed: asyncio.Future[None] | None = None
        self._nonce = b""
        self._tasks = Tasks()

    async def prepare(self, epoch: int) -> RingAddress:
        """End the old epoch for good and return where the new one may write."""
        await self.close()
        self._reset()
        self._epoch = epoch
        self._broken = asyncio.Event()
        regions = [
            Region(t.data_ptr(), t.numel() * t.element_size(), _device(t))
            for t in (self._receive, self._send)
        ]
        self._agent = await self._transfer.open(
            f"{self._name}/ring/{epoch}/{secrets.token_hex(4)}", regions, self._on_notify
        )
        return RingAddress(
            agent=self._agent.metadata,
            base=self._receive.data_ptr(),
            slot_bytes=self._slot_bytes,
            slots=self._slots,
        )

    async def form(self, previous: RingAddress | None, following: RingAddress | None) -> None:
        """Connect to the neighbours; return when the next one has answered a nonce.

        Raises PeerLost when it has not in time, or its ring has another shape.
        """
        agent = self._require_agent()
        timeout = self._settings.connect_seconds
        if previous is not None:
            self._previous = await agent.connect(previous.agent, timeout)
        if following is None:
            return
        if (following.slot_bytes, following.slots) != (self._slot_bytes, self._slots):
            raise PeerLost(
                f"the next stage's ring has {following.slots} slots of {following.slot_bytes} "
                f"bytes, ours {self._slots} of {self._slot_bytes}: start all stages of a group "
                "with the same settings"
            )
        self._next = await agent.connect(following.agent, timeout)
        self._next_base = following.base
        await self._probe(agent)

    async def _probe(self, agent: Agent) -> None:
        self._nonce = secrets.token_bytes(16)
        self._echoed = asyncio.get_running_loop().create_future()
        probe = messages.encode(RingProbe(epoch=self._epoch, nonce=self._nonce))
        deadline = asyncio.get_running_loop().time() + self._settings.connect_seconds
        while not self._echoed.done():
            if asyncio.get_running_loop().time() > deadline:
                raise PeerLost(
                    f"the next stage did not answer a nonce over the data path in "
                    f"{self._settings.connect_seconds} s"
                )
            await agent.notify(self._next, probe)
            await asyncio.wait([self._echoed], timeout=self._settings.probe_seconds)

    async def receive(self, tokens: int) -> torch.Tensor:
        """Return a copy of the next hand-over, (tokens, hidden), and give its slot back.

        Waits for as long as the epoch lasts: the stage before may have much to do. Raises
        PipelineBroken when the epoch ends.
        """
        number = self._received
        arrived = self._arrived.setdefault(number, asyncio.Event())
        await self._unless_broken(arrived, f"the activations of hand-over {number}")
        del self._arrived[number]
        self._received += 1
        agent = self._require_agent()
        hidden = await self._streams.clone(self._receive[number % self._slots, :tokens])
        self._require_same(agent)
        credit = messages.encode(Credit(epoch=self._epoch, number=number))
        self._notify_previous(agent, credit)
        return hidden

    def send(self, hidden: torch.Tensor) -> Coroutine[object, object, None]:
        """Write the next hand-over, (tokens, hidden), into the next stage's slot.

        The order is that of the calls. The coroutine ends when the bytes lie there; it raises
        PipelineBroken when the epoch ends, PeerLost and TransferTimeout as `Agent.write`.
        """
        number = self._sent
        self._sent += 1
        return self._write(number, hidden)

    async def _write(self, number: int, hidden: torch.Tensor) -> None:
        while self._credited < number - self._slots:
            self._credit.clear()
            await self._unless_broken(
                self._credit, f"the credit of hand-over {number - self._slots}"
            )
        slot = number % self._slots
        tokens = hidden.shape[0]
        agent = self._require_agent()
        await self._streams.copy(self._send[slot, :tokens], hidden)
        self._require_same(agent)
        nbytes = tokens * hidden.shape[1] * hidden.element_size()
        local = np.array([[self._send[slot].data_ptr(), nbytes]], np.uint64)
        remote = np.array([[self._next_base + slot * self._slot_bytes, nbytes]], np.uint64)
        note = messages.encode(Activations(epoch=self._epoch, number=number))
        await agent.write(self._next, local, remote, note, self._settings.write_seconds)

    async def close(self) -> None:
        """End the epoch: whoever waits gets PipelineBroken, and nothing lands in the arenas."""
        self._broken.set()
        await self._tasks.cancel()
        if self._agent is not None:
            await self._agent.fence()
            self._agent = None

    def _on_notify(self, payload: bytes) -> None:
        # Unauthenticated bytes from the data path: anything unexpected is dropped.
        with contextlib.suppress(WireError):
            note = messages.decode_notification(payload)
            if getattr(note, "epoch", None) != self._epoch or self._agent is None:
                return
            if isinstance(note, Activations):
                if self._received <= note.number < self._received + self._slots:
                    self._arrived.setdefault(note.number, asyncio.Event()).set()
            elif isinstance(note, Credit):
                if self._credited < note.number < self._sent:
                    self._credited = note.number
                    self._credit.set()
            elif isinstance(note, RingProbe) and self._previous:
                echo = messages.encode(RingEcho(epoch=self._epoch, nonce=note.nonce))
                self._notify_previous(self._agent, echo)
            elif isinstance(note, RingEcho):
                self._echo(note.nonce)

    def _echo(self, nonce: bytes) -> None:
        waiting = self._echoed is not None and not self._echoed.done()
        if waiting and secrets.compare_digest(nonce, self._nonce):
            assert self._echoed is not None
            self._echoed.set_result(None)

    def _notify_previous(self, agent: Agent, note: bytes) -> None:
        self._tasks.spawn(
            _notify(agent, self._previous, note), f"notification of epoch {self._epoch}"
        )

    async def _unless_broken(self, event: asyncio.Event, what: str) -> None:
        waiter = asyncio.create_task(event.wait())
        broken = asyncio.create_task(self._broken.wait())
        try:
            await asyncio.wait({waiter, broken}, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.is_set():
                raise PipelineBroken(f"epoch {self._epoch} ended while waiting for {what}")
        finally:
            waiter.cancel()
            broken.cancel()

    def _require_agent(self) -> Agent:
        if self._agent is None:
            raise PipelineBroken(f"epoch {self._epoch} has ended")
        return self._agent

    def _require_same(self, agent: Agent) -> None:
        """Raise PipelineBroken if the epoch of `agent` ended during an await."""
        if self._agent is not agent:
            raise PipelineBroken("the epoch ended during a copy")


async def _notify(agent: Agent, peer: str, note: bytes) -> None:
    # The coroutine of `notify` is made here and not by the caller: an epoch's end may cancel this
    # task before its first step. A peer that is lost is noticed by its heartbeats.
    with contextlib.suppress(TransferError):
        await agent.notify(peer, note)


def _device(tensor: torch.Tensor) -> int | None:
    return tensor.get_device() if tensor.is_cuda else None
