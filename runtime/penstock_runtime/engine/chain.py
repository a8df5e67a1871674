"""Forming the chain: stage 0 brings all stages of its group into one epoch.

    every stage linked → Prepare(epoch) to all → Prepared from all → Form(neighbours) to all
    → Formed from all → plans flow

A stage that is lost, or the data path between two stages, ends the epoch: the next one begins as
soon as every stage is there again. Surviving stages keep weights and memory. This file holds the
other side too: what a stage does on Prepare and Form.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from penstock_runtime.transfer.base import PeerLost, TransferError
from penstock_wire.messages import Form, Formed, Message, Prepare, Prepared, RingAddress
from penstock_wire.sockets import ControlClient, LinkDown, LinkState
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from penstock_runtime.engine.ring import ActivationRing
    from penstock_runtime.engine.stage import PrefillStage
    from penstock_wire.messages import Hello

log = logging.getLogger(__name__)
_A = TypeVar("_A", Prepared, Formed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainSettings:
    """Waits of forming, in seconds."""

    form_seconds: float = 15.0
    """For all stages to answer Prepare, then Form. A stage first lets its transfers end."""
    retry_seconds: float = 0.5
    """Before trying again after a stage did not answer."""


class Member:
    """A stage's part in the chain: ends the old epoch and connects its neighbours."""

    def __init__(self, stage: int, executor: PrefillStage, ring: ActivationRing) -> None:
        self._stage = stage
        self._executor = executor
        self._ring = ring
        self._lock = asyncio.Lock()
        self._epoch = -1

    async def handle(self, message: Prepare | Form, reply: Callable[[Message], None]) -> None:
        """Carry out the message; one after another. A failure is left to stage 0's deadline."""
        async with self._lock:
            try:
                if isinstance(message, Prepare):
                    await self._prepare(message, reply)
                elif message.epoch == self._epoch:
                    await self._ring.form(message.previous, message.next)
                    self._executor.begin(self._epoch)
                    reply(Formed(epoch=self._epoch, stage=self._stage))
            except (TransferError, LinkDown) as error:
                log.warning("stage %d cannot join epoch %d: %s", self._stage, self._epoch, error)

    async def _prepare(self, message: Prepare, reply: Callable[[Message], None]) -> None:
        self._epoch = message.epoch
        await self._executor.end()
        ring = await self._ring.prepare(message.epoch)
        reply(Prepared(epoch=message.epoch, stage=self._stage, ring=ring))


OnFormed: TypeAlias = Callable[[int, int, bool], None]
"""(epoch, pages of the smallest pool, whether a stage is another process than before)"""


class Chain:
    """Stage 0's view of its group.

    Args:
        clients: control links to stages 1 … P-1.
        member: stage 0's own part.
        layers: that stage 0 holds.
        pages: stage 0's own pool size.
        on_formed: plans may flow.
        on_broken: the epoch ended; said once for each formed epoch.
    """

    def __init__(
        self,
        clients: list[ControlClient],
        member: Member,
        *,
        layers: tuple[float, float],
        pages: int,
        on_formed: OnFormed,
        on_broken: Callable[[str], None],
        settings: ChainSettings | None = None,
    ) -> None:
        self._clients = clients
        self._member = member
        self._layers = layers
        self._pages = pages
        self._on_formed = on_formed
        self._on_broken = on_broken
        self._settings = settings or ChainSettings()
        self._answers: asyncio.Queue[Prepared | Formed | LinkDown] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._boots: tuple[str, ...] = ()
        self._own = Tasks()
        self.epoch = 0
        self.formed = False
        self._changed.set()

    @property
    def stages(self) -> int:
        """Stages in the group."""
        return len(self._clients) + 1

    @property
    def layers_per_stage(self) -> list[float]:
        """Layers of each stage, of those that are linked."""
        return [last - first for first, last in self._ranges()]

    @property
    def missing(self) -> list[int]:
        """Stages that are not linked."""
        return [i for i, client in enumerate(self._clients, start=1) if not client.up]

    def link_changed(self, stage: int, state: LinkState, hello: Hello | None) -> None:
        """A stage's control link changed."""
        if state is LinkState.LOST:
            name = hello.name if hello is not None else "?"
            reason = f"stage {stage} ({name}) is lost"
            self.broken(reason)
            # A data path breaks before its control link does, so the next epoch may be forming
            # already: it need not wait for answers that cannot come.
            self._answers.put_nowait(LinkDown(reason))
        self._changed.set()

    def broken(self, reason: str) -> None:
        """End the epoch; a new one is formed when every stage is there."""
        if self.formed:
            self.formed = False
            log.warning("epoch %d ended: %s", self.epoch, reason)
            self._on_broken(reason)
        self._changed.set()

    def answer(self, message: Prepared | Formed) -> None:
        """A stage answered Prepare or Form."""
        self._answers.put_nowait(message)

    def broadcast(self, message: Message) -> None:
        """Send to stages 1 … P-1. A stage that is gone is noticed by its link."""
        data_down = False
        for client in self._clients:
            try:
                client.send(message)
            except LinkDown:
                data_down = True
        if data_down:
            self.broken("a stage did not take a plan")

    async def run(self) -> None:
        """Form epochs for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.formed or self.missing:
                continue
            try:
                await self._form()
            except (TimeoutError, LinkDown, TransferError) as error:
                log.warning("epoch %d was not formed: %s", self.epoch, error or "no answer in time")
                await asyncio.sleep(self._settings.retry_seconds)
                self._changed.set()

    def _ranges(self) -> list[tuple[float, float]]:
        """The layers of stage 0, then of the others that are linked."""
        others = [client.hello.layers for client in self._clients if client.hello is not None]
        return [self._layers, *others]

    def _check_layers(self) -> None:
        """Raise PeerLost if a stage does not begin where the one before it ends."""
        for stage, (before, own) in enumerate(itertools.pairwise(self._ranges()), start=1):
            if before[1] != own[0]:
                raise PeerLost(
                    f"stage {stage} begins at layer {own[0]:g}, and the stage before it ends at "
                    f"{before[1]:g}: start all stages of a group with the same --layers-per-stage"
                )

    async def _form(self) -> None:
        self.epoch += 1
        self._check_layers()
        self._answers = asyncio.Queue()
        rings: list[RingAddress | None] = [None] * self.stages
        async with asyncio.timeout(self._settings.form_seconds):
            self._ask(lambda _: Prepare(epoch=self.epoch))
            for _ in range(self.stages):
                prepared = await self._next(Prepared)
                rings[prepared.stage] = prepared.ring
            boots = tuple(c.hello.boot_id if c.hello is not None else "" for c in self._clients)
            pages = min([self._pages, *(c.hello.pages for c in self._clients if c.hello)])
            self._ask(
                lambda i: Form(
                    epoch=self.epoch,
                    previous=rings[i - 1] if i > 0 else None,
                    next=rings[i + 1] if i + 1 < self.stages else None,
                    pages=pages,
                )
            )
            for _ in range(self.stages):
                await self._next(Formed)
        if self.missing:
            raise LinkDown(f"stages {self.missing} were lost while forming")
        replaced = boots != self._boots
        self._boots = boots
        self.formed = True
        log.info("epoch %d formed: %d stages, %d pages", self.epoch, self.stages, pages)
        self._on_formed(self.epoch, pages, replaced)

    def _ask(self, message: Callable[[int], Prepare | Form]) -> None:
        for i, client in enumerate(self._clients, start=1):
            client.send(message(i))
        self._own.spawn(self._member.handle(message(0), self._own_answer), "stage 0 as a member")

    def _own_answer(self, message: Message) -> None:
        assert isinstance(message, Prepared | Formed)
        self.answer(message)

    async def _next(self, kind: type[_A]) -> _A:
        while True:
            message = await self._answers.get()
            if isinstance(message, LinkDown):
                raise message
            if isinstance(message, kind) and message.epoch == self.epoch:
                return message
