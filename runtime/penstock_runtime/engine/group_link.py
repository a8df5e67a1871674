"""A decode worker's link to one prefill group: grants out, KV pages in.

One receiving agent a group, so a fence costs this group's transfers alone. Its incarnation rises
with each fence; OpenLink tells every stage, each stage verifies by a nonce, and the group is ready
when all have. A stage that is lost, a link that fails and a revocation that is not acknowledged in
time all lead to the same place: fence, tell whose grants were cut, open the next incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock_runtime.kvcache.base import attention_layers
from penstock_runtime.transfer.base import TransferError
from penstock_wire import messages
from penstock_wire.messages import (
    ChunkDelivered,
    KvArenaAddress,
    KvTarget,
    LinkEcho,
    LinkFailed,
    LinkProbe,
    LinkUp,
    OpenLink,
    Prefill,
    PrefillFailed,
    Revoke,
    RevokeAck,
    WireError,
)
from penstock_wire.sockets import ControlClient, LinkDown, LinkState
from penstock_wire.tasks import start

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator, Sequence

    from penstock_runtime.transfer.base import Agent, Transfer
    from penstock_runtime.transfer.ownership import Delivery, GrantLedger, Revocation
    from penstock_runtime.transfer.page_ranges import KvArena
    from penstock_wire.keys import Keys
    from penstock_wire.messages import Control, GroupAddress, Hello
    from penstock_wire.names import Resolver

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLinkSettings:
    """Waits, in seconds."""

    revoke_seconds: float = 2.0
    """For every stage's RevokeAck. A stage lets its writes end first, which takes milliseconds;
    one that is silent for longer is fenced."""
    reopen_seconds: float = 0.25
    """Between a fence and the next incarnation after a link failed, so that a path that is down
    does not keep a core busy."""


class GrantOwner(Protocol):
    """Who asked for grants: the decode engine."""

    def prefill_complete(self, grant: int, reused: int) -> None:
        """All KV is there, `reused` tokens of it without being computed; the grant has ended."""
        ...

    def prefill_cut(self, cut: Revocation, reason: str) -> None:
        """The grant ended early; what `cut` says was delivered is there."""
        ...

    def group_changed(self) -> None:
        """The group became ready, or is no longer."""
        ...


class GroupLink:
    """One prefill group, as one decode worker sees it. The event loop's thread owns it.

    Args:
        group: its name and its stages' addresses.
        hello: this worker's; stages whose model or KV layout differ are not used.
        keys: of the service.
        resolver: of the stages' addresses.
        transfer: opens agents.
        arenas: the KV pool's memory, all layers; one a rank.
        ledger: of all grants of this worker.
        incarnations: numbers that no group of this worker has used.
        owner: is told how grants end.
    """

    def __init__(
        self,
        group: GroupAddress,
        *,
        hello: Hello,
        keys: Keys,
        resolver: Resolver,
        transfer: Transfer,
        arenas: Sequence[KvArena],
        ledger: GrantLedger,
        incarnations: Iterator[int],
        owner: GrantOwner,
        settings: GroupLinkSettings | None = None,
    ) -> None:
        self.group = group
        self._hello = hello
        self._transfer = transfer
        self._arenas = arenas
        self._ledger = ledger
        self._incarnations = incarnations
        self._owner = owner
        self._settings = settings or GroupLinkSettings()
        self._agent: Agent | None = None
        self._incarnation = -1
        self._verified: set[int] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._renew_again = False
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._closed = False
        self.fences = 0
        self._clients = [
            ControlClient(
                address,
                hello,
                keys,
                on_message=_bind(self._on_message, i),
                on_state=_bind(self._on_state, i),
                resolver=resolver,
            )
            for i, address in enumerate(group.stages)
        ]

    @property
    def ready(self) -> bool:
        """Whether every stage has verified its link, and none is about to stop."""
        verified = len(self._verified) == len(self._clients)
        return verified and all(client.state is LinkState.READY for client in self._clients)

    def start(self) -> None:
        """Connect to every stage."""
        for client in self._clients:
            client.start()
        self._renew("start", 0.0)

    async def close(self) -> None:
        """End every grant of this group, by a fence, and disconnect."""
        self._closed = True
        for client in self._clients:
            await client.close()
        if self._renewing is not None:
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._fence("the group was removed")

    # --- grants --------------------------------------------------------------------------------

    def prefill(
        self,
        request_id: str,
        tokens: array[int],
        cached: int,
        pages: Sequence[int],
        salt: bytes,
    ) -> int:
        """Grant pages and send the prompt to stage 0. Returns the grant.

        Raises LinkDown if the group is not ready; nothing was granted then.
        """
        leader = self._clients[0]
        if not self.ready or not leader.up:
            raise LinkDown(f"prefill group {self.group.name} is not ready")
        grant = self._ledger.open(
            incarnation=self._incarnation,
            writers=[_process(client.hello) for client in self._clients],
            pages=pages,
            cached=cached,
            end=len(tokens),
        )
        try:
            leader.send(
                Prefill(
                    grant=grant,
                    request_id=request_id,
                    incarnation=self._incarnation,
                    tokens=messages.pack_tokens(tokens),
                    cached=cached,
                    pages=tuple(pages),
                    salt=salt,
                )
            )
        except LinkDown as error:
            # The link's end is being reported; the fence that follows settles the grant.
            self._renew(str(error), 0.0)
        return grant

    def revoke(self, grant: int) -> Revocation:
        """Take a grant back. Its pages are free when every stage agreed, or after a fence."""
        cut = self._ledger.revoke(grant)
        message = Revoke(grant=grant, floor=self._ledger.floor())
        for client in self._clients:
            with contextlib.suppress(LinkDown):
                client.send(message)
        self._timers[grant] = asyncio.get_running_loop().call_later(
            self._settings.revoke_seconds, self._overdue, grant
        )
        return cut

    def _overdue(self, grant: int) -> None:
        self._timers.pop(grant, None)
        missing = sorted(self._ledger.awaited(grant))
        if missing:
            self._renew(f"stages {missing} did not acknowledge a revocation in time", 0.0)

    # --- stages --------------------------------------------------------------------------------

    def _on_state(self, stage: int, state: LinkState, _: Hello | None) -> None:
        if state is LinkState.LOST:
            self._renew(f"stage {stage} is lost", 0.0)
            return
        # READY again after DRAINING invites once more; the stage ignores what it knows.
        if state is LinkState.READY and self._agent is not None:
            self._invite(stage)
        self._owner.group_changed()

    def _invite(self, stage: int) -> None:
        client = self._clients[stage]
        theirs, ours = client.hello, self._hello
        if theirs is None or not client.up or self._agent is None:
            return
        if (theirs.model_digest, theirs.kv_layout) != (ours.model_digest, ours.kv_layout):
            log.warning(
                "stage %d of %s serves another model or KV layout and is not used",
                stage,
                self.group.name,
            )
            return
        target = KvTarget(
            receiver=f"{ours.name}/{ours.boot_id}",
            incarnation=self._incarnation,
            agent=self._agent.metadata,
            arenas=tuple(
                KvArenaAddress(base=arena.region.address, heads=arena.heads)
                for arena in self._arenas
            ),
            pages=ours.pages,
            layers=attention_layers(ours.layers),
        )
        with contextlib.suppress(LinkDown):
            client.send(OpenLink(target=target))

    def _on_message(self, stage: int, message: Control) -> None:
        if isinstance(message, RevokeAck):
            self._acknowledged(stage, message)
        elif isinstance(message, PrefillFailed):
            if self._ledger.is_open(message.grant):
                self._owner.prefill_cut(self.revoke(message.grant), message.message)
        elif isinstance(message, LinkUp | LinkFailed):
            self._link_answer(stage, message)

    def _acknowledged(self, stage: int, message: RevokeAck) -> None:
        writer = _process(self._clients[stage].hello)
        if self._ledger.acknowledged(message.grant, stage, writer):
            timer = self._timers.pop(message.grant, None)
            if timer is not None:
                timer.cancel()
            self._owner.group_changed()

    def _link_answer(self, stage: int, message: LinkUp | LinkFailed) -> None:
        if message.incarnation != self._incarnation:
            return
        if isinstance(message, LinkFailed):
            self._renew(f"stage {stage}: {message.message}", self._settings.reopen_seconds)
            return
        self._verified.add(stage)
        if self.ready:
            log.info("prefill group %s is ready", self.group.name)
            self._owner.group_changed()

    def _on_notify(self, incarnation: int, payload: bytes) -> None:
        # Unauthenticated bytes: only a typed note about this incarnation counts.
        try:
            note = messages.decode_notification(payload)
        except WireError as error:
            log.warning("dropped a notification: %s", error)
            return
        if getattr(note, "incarnation", None) != incarnation or incarnation != self._incarnation:
            return
        if isinstance(note, ChunkDelivered):
            delivery: Delivery | None = self._ledger.delivered(
                incarnation, note.grant, note.stage, note.start, note.end
            )
            if delivery is not None and delivery.complete:
                self._owner.prefill_complete(note.grant, note.reused)
        elif isinstance(note, LinkProbe) and 0 <= note.stage < len(self._clients):
            echo = LinkEcho(incarnation=incarnation, nonce=note.nonce)
            with contextlib.suppress(LinkDown):
                self._clients[note.stage].send(echo)

    # --- fences --------------------------------------------------------------------------------

    def _renew(self, reason: str, delay: float) -> None:
        """Fence the current incarnation and open the next."""
        was_ready = self.ready
        self._verified.clear()
        self._owner.group_changed()
        if self._closed:
            return
        if was_ready:
            log.warning("prefill group %s is not ready: %s", self.group.name, reason)
        if self._renewing is not None:
            self._renew_again = True
            return
        self._renewing = start(self._renew_now(reason, delay), f"renewal of {self.group.name}")

    async def _renew_now(self, reason: str, delay: float) -> None:
        try:
            while True:
                self._renew_again = False
                await self._fence(reason)
                await asyncio.sleep(delay)
                await self._open()
                if not self._renew_again or self._closed:
                    return
                delay = self._settings.reopen_seconds
        finally:
            self._renewing = None

    async def _fence(self, reason: str) -> None:
        agent, self._agent = self._agent, None
        incarnation, self._incarnation = self._incarnation, -1
        if agent is None:
            return
        await agent.fence()
        self.fences += 1
        for cut in self._ledger.fenced(incarnation):
            self._owner.prefill_cut(cut, reason)
        self._owner.group_changed()

    async def _open(self) -> None:
        incarnation = next(self._incarnations)
        name = f"{self._hello.name}/{self._hello.boot_id}/{self.group.name}/{incarnation}"
        try:
            self._agent = await self._transfer.open(
                f"{name}/{secrets.token_hex(4)}",
                [arena.region for arena in self._arenas],
                lambda payload: self._on_notify(incarnation, payload),
            )
        except TransferError as error:
            log.warning("cannot open an agent for %s: %s", self.group.name, error)
            self._renew_again = True
            return
        self._incarnation = incarnation
        for stage in range(len(self._clients)):
            self._invite(stage)


def _bind(function: Callable[..., None], stage: int) -> Callable[..., None]:
    return lambda *arguments: function(stage, *arguments)


def _process(hello: Hello | None) -> str:
    return f"{hello.name}/{hello.boot_id}" if hello is not None else ""


def incarnations() -> Iterator[int]:
    """Return the incarnation numbers of one process."""
    return itertools.count(1)
