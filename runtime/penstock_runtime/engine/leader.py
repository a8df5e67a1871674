"""Stage 0's other half: it takes in prompts, decides every step, and tells all stages.

    decode workers ──Prefill, Revoke──►  Leader  ──StepPlan──► all stages
    stages ──StepDone, Released, StageFault──►   ──PrefillFailed──► decode workers

The deciding itself is `scheduler.prefill`'s; here messages become its calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.prefill import GrantFailed, PrefillRequest, PromptRefused
from penstock_wire import blocks
from penstock_wire.messages import (
    Formed,
    KvEvents,
    Load,
    Message,
    Prefill,
    PrefillFailed,
    Prepared,
    Released,
    Snapshot,
    StageFault,
    StepDone,
    WireError,
    unpack_tokens,
)

if TYPE_CHECKING:
    from array import array

    from penstock_runtime.engine.chain import Chain
    from penstock_runtime.engine.stage import PrefillStage
    from penstock_runtime.scheduler.prefill import PrefillScheduler

log = logging.getLogger(__name__)

Reply: TypeAlias = Callable[[str, Message], None]
"""(receiver, message): to a decode worker, dropped if it is gone."""


class Leader:
    """Runs on stage 0's event loop.

    Args:
        scheduler: decides.
        chain: the group's stages; its callbacks are this object's `formed` and `broken`.
        stage: stage 0's own executor.
        page_size: tokens a page.
        model_digest: part of every block's hash.
        reply: to decode workers.
        on_change: called after whatever happened was dealt with: a message of any stage or decode
            worker, the end of an epoch.
    """

    def __init__(
        self,
        scheduler: PrefillScheduler,
        pool: PagePool,
        stage: PrefillStage,
        *,
        model_digest: str,
        reply: Reply,
        on_change: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._stage = stage
        self._model_digest = model_digest
        self._reply = reply
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._chain: Chain | None = None
        self._event_seq = 0
        self._pool_replaced = False

    def lead(self, chain: Chain) -> None:
        """The chain that this leader's plans go down."""
        self._chain = chain

    @property
    def pool(self) -> PagePool:
        """The group's pages; replaced when a stage lost its own."""
        return self._pool

    @property
    def scheduler(self) -> PrefillScheduler:
        """What waits and runs."""
        return self._scheduler

    # --- decode workers ------------------------------------------------------------------------

    def prefill(self, receiver: str, message: Prefill) -> None:
        """Queue a prompt."""
        try:
            tokens = unpack_tokens(message.tokens)
            self._scheduler.add(
                PrefillRequest(
                    grant=message.grant,
                    receiver=receiver,
                    incarnation=message.incarnation,
                    tokens=tokens,
                    cached=message.cached,
                    target_pages=message.pages,
                    root=blocks.root_hash(self._model_digest, message.salt),
                ),
                time.monotonic(),
            )
        except (PromptRefused, WireError) as error:
            self._reply(receiver, PrefillFailed(grant=message.grant, message=str(error)))
            return
        self._wake.set()

    def revoke(self, receiver: str, grant: int) -> None:
        """A decode worker does not want a prompt any more."""
        self._scheduler.revoke(receiver, grant)
        self._wake.set()

    def receiver_lost(self, receiver: str) -> None:
        """A decode worker is gone, or has fenced: its prompts end."""
        self._scheduler.drop_receiver(receiver)
        self._wake.set()

    def drop_older(self, receiver: str, incarnation: int) -> None:
        """A decode worker opened a newer incarnation: older grants are dead."""
        self._scheduler.drop_receiver(receiver, before=incarnation)
        self._wake.set()

    # --- stages --------------------------------------------------------------------------------

    def formed(self, epoch: int, pages: int, replaced: bool) -> None:
        """Every stage has ended the old epoch and begun this one."""
        pool = None
        if replaced or pages != self._pool.total:
            # A new process has none of the old pages, and all stages number pages alike.
            pool = self._pool = PagePool(pages, self._pool.page_size)
            self._pool_replaced = True
        self._fail(self._scheduler.new_epoch(epoch, "the pipeline was re-formed", pool))
        self._wake.set()

    def from_stage(self, message: Message) -> None:
        """Handle what a stage, this one included, says to stage 0."""
        assert self._chain is not None
        if isinstance(message, Prepared | Formed):
            self._chain.answer(message)
        elif isinstance(message, StepDone):
            self._scheduler.step_done(message)
        elif isinstance(message, Released):
            self._scheduler.released(message.epoch, message.stage, message.keys)
        elif isinstance(message, StageFault):
            self._fault(message)
        self._wake.set()

    def _fault(self, message: StageFault) -> None:
        assert self._chain is not None
        if message.key < 0:
            if message.epoch == self._chain.epoch:
                self._chain.broken(f"stage {message.stage}: {message.message}")
            return
        failed = self._scheduler.fault(message.epoch, message.key, message.message)
        if failed is not None:
            self._fail([failed])

    def _fail(self, failed: list[GrantFailed]) -> None:
        for f in failed:
            self._reply(f.receiver, PrefillFailed(grant=f.grant, message=f.message))

    def broken(self, reason: str) -> None:
        """The epoch ended; those in the pipeline are told when the next one has been formed."""
        log.info("waiting for the group to form again: %s", reason)
        self._wake.set()

    # --- plans ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send plans for ever, whenever there is one to send."""
        assert self._chain is not None
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._chain.formed:
                plan = self._scheduler.next_plan(time.monotonic())
                if plan is None:
                    break
                self._chain.broadcast(plan)
                self._stage.submit(plan)
            self._on_change()

    def prompt_tokens(self, key: int, start: int, length: int) -> torch.Tensor:
        """Return a request's token ids for stage 0's embedding, int64 (length,)."""
        tokens: array[int] = self._scheduler.prompt(key, start, length)
        return torch.frombuffer(tokens, dtype=torch.int32).to(torch.int64)

    # --- routers -------------------------------------------------------------------------------

    def events(self) -> KvEvents | Snapshot | None:
        """Return what changed among the blocks since the last call, if anything did."""
        stored, evicted = self._pool.drain_events()
        if self._pool_replaced:
            self._pool_replaced = False
            self._event_seq += 1
            return self.snapshot()
        if not stored and not evicted:
            return None
        self._event_seq += 1
        return KvEvents(seq=self._event_seq, stored=b"".join(stored), evicted=b"".join(evicted))

    def snapshot(self) -> Snapshot:
        """Return all blocks. Events that were not sent yet are in it: call `events` first."""
        return Snapshot(seq=self._event_seq, hashes=b"".join(self._pool.snapshot()))

    def load(self, state: Literal["starting", "ready", "draining"]) -> Load:
        """Return how busy the group is."""
        load = self._scheduler.load()
        return Load(
            state=state,
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            queued_seconds=load.queued_seconds,
            pages_free=self._pool.available(),
            pages_total=self._pool.total,
            cost=self._scheduler.cost(),
            stages=self._chain.stages if self._chain else 1,
        )
