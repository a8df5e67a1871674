"""A prefill stage's links to decode workers: KV pages out, cached prefixes in.

One agent a decode worker: what goes wrong with one costs the transfers to that one alone. A link is
used only after a nonce went round it: out over the data path (LinkProbe), back over the control
link (LinkEcho). It ends when the receiver opens a newer incarnation, when its control link is lost,
or when a transfer fails; the agent is fenced then, so its pages may be reused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from penstock_runtime.transfer.base import PeerLost, TransferError, TransferTimeout
from penstock_runtime.transfer.page_ranges import Side, page_ranges
from penstock_runtime.transfer.writer import GrantRevokedError, LinkDownError, WriterLedger
from penstock_wire import messages
from penstock_wire.messages import (
    ChunkDelivered,
    KvTarget,
    LinkEcho,
    LinkFailed,
    LinkProbe,
    LinkUp,
    Message,
    Revoke,
    RevokeAck,
)
from penstock_wire.sockets import LinkDown
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from penstock_runtime.kvcache.base import KVLayout
    from penstock_runtime.transfer.base import Agent, Transfer
    from penstock_runtime.transfer.page_ranges import KvArena
    from penstock_runtime.transfer.writer import LinkOperation
    from penstock_wire.messages import Admit

log = logging.getLogger(__name__)

Reply: TypeAlias = Callable[[Message], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvWriterSettings:
    """Waits of the links, in seconds."""

    connect_seconds: float = 10.0
    """For a new link's nonce to come back."""
    transfer_seconds: float = 30.0
    """For one read or write. Longer than any hiccup of the receiver; one that is silent for longer
    than the lease of its control link loses the link before that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageIdentity:
    """Who this stage is, for probes and agents' names."""

    name: str
    boot_id: str
    group: str
    stage: int


@dataclass(slots=True, eq=False)
class _Link:
    target: KvTarget
    reply: Reply
    agent: Agent
    nonce: bytes
    ledger: WriterLedger
    peer: str = ""
    echoed: asyncio.Event = field(default_factory=asyncio.Event)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False


class KvWriter:
    """All links of one stage. The event loop's thread owns it."""

    def __init__(
        self,
        transfer: Transfer,
        identity: StageIdentity,
        arenas: Sequence[KvArena],
        layout: KVLayout,
        settings: KvWriterSettings | None = None,
    ) -> None:
        self._transfer = transfer
        self._identity = identity
        self._arenas = arenas
        self._layout = layout
        self._settings = settings or KvWriterSettings()
        self._links: dict[str, _Link] = {}
        # A receiver's ledger outlives its links: revocations of an older incarnation's grants are
        # answered after it, and never for a write of which it is not certain where its bytes are.
        self._ledgers: dict[str, WriterLedger] = {}
        self._replies: dict[str, Reply] = {}
        # A fence that failed may leave bytes moving: its report ends the process.
        self._tasks = Tasks()
        self._opening: dict[str, int] = {}
        self.bytes_written = 0
        self.bytes_read = 0

    # --- the receiver's messages ---------------------------------------------------------------

    def open(self, target: KvTarget, reply: Reply) -> None:
        """Open a link to this incarnation, dropping an older one."""
        opened = self._opening.get(target.receiver, -1)
        if target.incarnation <= opened:
            if target.receiver not in self._ledgers:
                # Its link was dropped here. What was in flight then is known no more: the receiver
                # must fence, so it gets no second link to the same agent.
                reply(
                    LinkFailed(
                        incarnation=target.incarnation,
                        stage=self._identity.stage,
                        message="this link was lost",
                    )
                )
            return
        self._opening[target.receiver] = target.incarnation
        ledger = self._ledgers.setdefault(target.receiver, WriterLedger())
        self._replies[target.receiver] = reply
        self._tasks.spawn(self._open(target, reply, ledger), f"KV link to {target.receiver}")

    async def _open(self, target: KvTarget, reply: Reply, ledger: WriterLedger) -> None:
        old = self._links.pop(target.receiver, None)
        if old is not None:
            await self._shut(old)
        ledger.link_opened(target.incarnation)
        who = self._identity
        agent = await self._transfer.open(
            f"{who.name}/{who.boot_id}/kv/{secrets.token_hex(8)}",
            [arena.region for arena in self._arenas],
            _ignore,
        )
        link = _Link(target, reply, agent, secrets.token_bytes(16), ledger)
        if self._ledgers.get(target.receiver) is not ledger or (
            self._opening[target.receiver] != target.incarnation
        ):
            await self._shut(link)
            return
        self._links[target.receiver] = link
        try:
            await self._verify(link)
        except TransferError as error:
            await self._lose(link, str(error))

    async def _verify(self, link: _Link) -> None:
        who, timeout = self._identity, self._settings.connect_seconds
        link.peer = await link.agent.connect(link.target.agent, timeout)
        probe = LinkProbe(
            incarnation=link.target.incarnation,
            group=who.group,
            stage=who.stage,
            boot_id=who.boot_id,
            nonce=link.nonce,
        )
        await link.agent.notify(link.peer, messages.encode(probe))
        try:
            async with asyncio.timeout(timeout):
                await link.echoed.wait()
        except TimeoutError:
            raise PeerLost(
                f"no answer to a nonce over the data path in {timeout} s: does the network let "
                "pods of this service reach each other on every port?"
            ) from None
        link.up.set()
        self._tell(link, LinkUp(incarnation=link.target.incarnation, stage=who.stage))

    def echo(self, receiver: str, message: LinkEcho) -> None:
        """The receiver saw our nonce."""
        link = self._links.get(receiver)
        if link is None or link.target.incarnation != message.incarnation:
            return
        if secrets.compare_digest(link.nonce, message.nonce):
            link.echoed.set()

    def revoke(self, receiver: str, message: Revoke, reply: Reply) -> None:
        """Post nothing more for a grant; acknowledge when nothing of it is in flight."""
        ledger = self._ledgers.get(receiver)
        if ledger is not None:
            self._replies[receiver] = reply
            ledger.revoke(message.grant, message.floor)
            self._acknowledge(receiver, ledger)

    def receiver_lost(self, receiver: str) -> None:
        """The receiver's control link is gone: end its link, and forget it."""
        self._replies.pop(receiver, None)
        self._ledgers.pop(receiver, None)
        link = self._links.pop(receiver, None)
        if link is not None:
            self._tasks.spawn(self._shut(link), f"fence of the KV link to {receiver}")

    # --- the stage's transfers -----------------------------------------------------------------

    async def push(self, admit: Admit, first: int, last: int, start: int, end: int) -> None:
        """Write page positions [first, last) of a request into the receiver's pages.

        Announces tokens [start, end) behind the bytes. A revoked grant is left alone. Raises
        TransferError; the link is closed then and its agent fenced.
        """
        link = await self._ready(admit)
        try:
            operation = link.ledger.begin_write(admit.grant, admit.incarnation, start, end)
        except GrantRevokedError:
            return
        except LinkDownError as error:
            raise PeerLost(str(error)) from error
        note = ChunkDelivered(
            incarnation=admit.incarnation,
            grant=admit.grant,
            stage=self._identity.stage,
            start=start,
            end=end,
            reused=admit.start,
        )
        ours, theirs = self._ours(admit, first, last), self._theirs(link, admit, first, last)
        local, remote = page_ranges(self._layout, ours.layers, ours, theirs)
        await self._carry_out(
            link,
            operation,
            link.agent.write(
                link.peer, local, remote, messages.encode(note), self._settings.transfer_seconds
            ),
        )
        self.bytes_written += int(local[:, 1].sum())

    async def load(self, admit: Admit, first: int, last: int) -> None:
        """Read page positions [first, last) of a request from the receiver's pages.

        The receiver keeps those pages until we acknowledge a revocation, so a read counts as in
        flight like a write. Raises TransferError; the link is closed then and its agent fenced.
        """
        link = await self._ready(admit)
        try:
            operation = link.ledger.begin_read(admit.grant, admit.incarnation)
        except (GrantRevokedError, LinkDownError) as error:
            raise PeerLost(str(error)) from error
        ours, theirs = self._ours(admit, first, last), self._theirs(link, admit, first, last)
        remote, local = page_ranges(self._layout, ours.layers, theirs, ours)
        await self._carry_out(
            link,
            operation,
            link.agent.read(link.peer, local, remote, self._settings.transfer_seconds),
        )
        self.bytes_read += int(local[:, 1].sum())

    def finish(self, admit: Admit) -> None:
        """Nothing more will be pushed or loaded for this request."""
        if (ledger := self._ledgers.get(admit.receiver)) is not None:
            ledger.finish(admit.grant)

    async def _carry_out(
        self, link: _Link, operation: LinkOperation, transfer: Coroutine[object, object, None]
    ) -> None:
        try:
            await transfer
        except TransferTimeout as error:
            # Still under way: only our own fence, in `_lose`, ends it.
            await self._lose(link, str(error))
            raise
        except TransferError as error:
            link.ledger.failed(operation)
            await self._lose(link, str(error))
            raise
        link.ledger.done(operation)
        self._acknowledge(link.target.receiver, link.ledger)

    async def _ready(self, admit: Admit) -> _Link:
        link = self._links.get(admit.receiver)
        if link is None or link.target.incarnation != admit.incarnation:
            raise PeerLost(f"no link to {admit.receiver} (incarnation {admit.incarnation})")
        if not link.up.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.connect_seconds):
                    await link.up.wait()
        if link.closed or not link.up.is_set():
            raise PeerLost(f"the link to {admit.receiver} is closed")
        return link

    def _ours(self, admit: Admit, first: int, last: int) -> Side:
        layout = self._layout
        arenas = [(arena.region.address, arena.heads) for arena in self._arenas]
        return Side(arenas, (layout.first_layer, layout.last_layer), admit.pages[first:last])

    def _theirs(self, link: _Link, admit: Admit, first: int, last: int) -> Side:
        target = link.target
        arenas = [(arena.base, arena.heads) for arena in target.arenas]
        return Side(arenas, target.layers, admit.target_pages[first:last])

    # --- ends ----------------------------------------------------------------------------------

    async def _lose(self, link: _Link, reason: str) -> None:
        if link.closed:
            return
        log.warning("the KV link to %s is lost: %s", link.target.receiver, reason)
        if self._links.get(link.target.receiver) is link:
            del self._links[link.target.receiver]
        await self._shut(link)
        self._tell(
            link,
            LinkFailed(
                incarnation=link.target.incarnation, stage=self._identity.stage, message=reason
            ),
        )

    async def _shut(self, link: _Link) -> None:
        link.closed = True
        link.up.set()
        await link.agent.fence()
        link.ledger.fenced()
        self._acknowledge(link.target.receiver, link.ledger)

    async def close(self) -> None:
        """Fence every link."""
        for receiver in list(self._links):
            self.receiver_lost(receiver)
        await self._tasks.settle()

    def _acknowledge(self, receiver: str, ledger: WriterLedger) -> None:
        """Answer the revocations that can be answered now."""
        for grant in ledger.take_acknowledgements():
            if (reply := self._replies.get(receiver)) is not None:
                with contextlib.suppress(LinkDown):
                    reply(RevokeAck(grant=grant, stage=self._identity.stage))

    def _tell(self, link: _Link, message: Message) -> None:
        with contextlib.suppress(LinkDown):
            link.reply(message)


def _ignore(_: bytes) -> None:
    """Nobody has a reason to notify a stage's KV agent."""
