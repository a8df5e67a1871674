"""The prefill worker: one stage of a group, and its leader if it is stage 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from penstock_runtime.engine.chain import Chain, Member
from penstock_runtime.engine.leader import Leader
from penstock_runtime.engine.stage import PrefillStage
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.prefill import PrefillScheduler
from penstock_runtime.worker.publisher import Publisher
from penstock_wire.messages import (
    Form,
    LinkEcho,
    Message,
    OpenLink,
    Prefill,
    Prepare,
    Revoke,
    StepPlan,
    Subscribe,
)
from penstock_wire.sockets import ControlClient, ControlServer, LinkDown, Session
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.engine.kv_writer import KvWriter
    from penstock_runtime.engine.ring import ActivationRing
    from penstock_runtime.engine.stage import ChunkRunner
    from penstock_runtime.scheduler.chunk_planner import ChunkPlanner
    from penstock_runtime.worker.http import Health, WorkerState
    from penstock_runtime.worker.other_ranks import OtherRanks
    from penstock_wire.keys import Keys
    from penstock_wire.messages import Control, Hello, Load
    from penstock_wire.names import Resolver
    from penstock_wire.sockets import LinkState

log = logging.getLogger(__name__)

_NEWS_SECONDS = 0.2
"""Until every decode worker knows that this stage drains, and what it sent before has come in: some
round trips of a busy machine. There is nothing to wait for that would say so."""
_LINGER_SECONDS = 5.0
"""A draining stage without prompts stays so long for those that its leader has taken in: stages
of a group that is removed are told to end at the same time. Longer than from a prompt's end to the
first plan of the next."""


class PrefillWorker:
    """Control server, stage and, on stage 0, leader of one process.

    Args:
        hello: who this stage is; its `stages`, `stage` and `pages` describe the group.
        bind: of the control server.
        peers: control addresses of stages 1 … P-1, for stage 0; empty elsewhere.
        others: the stage's other ranks.
    """

    def __init__(
        self,
        *,
        hello: Hello,
        bind: str,
        peers: list[str],
        keys: Keys,
        resolver: Resolver,
        health: Health,
        runner: ChunkRunner,
        compute: Compute,
        ring: ActivationRing,
        kv: KvWriter,
        planner: ChunkPlanner,
        others: OtherRanks,
    ) -> None:
        self._hello = hello
        self._others = others
        self._health = health
        self._kv = kv
        self._leader_session: Session | None = None
        self._sessions: dict[str, Session] = {}
        self._tasks = Tasks()
        self._moved = asyncio.Event()
        self._server = ControlServer(
            bind,
            hello=lambda: hello,
            keys=keys,
            on_message=self._on_message,
            on_join=self._on_join,
            on_lost=self._on_lost,
            state=lambda: health.state,
        )
        first = hello.stage == 0
        self.stage = PrefillStage(
            hello.stage,
            hello.stages,
            runner=runner,
            compute=compute,
            ring=ring,
            kv=kv,
            to_leader=self._to_leader,
            prompt_tokens=self._prompt_tokens if first else None,
        )
        self._member = Member(hello.stage, self.stage, ring)
        self.leader: Leader | None = None
        self._chain: Chain | None = None
        self._publisher: Publisher | None = None
        self._clients: list[ControlClient] = []
        if first:
            self._lead(peers, keys, resolver, planner)

    def _lead(
        self, peers: list[str], keys: Keys, resolver: Resolver, planner: ChunkPlanner
    ) -> None:
        hello = self._hello
        pool = PagePool(hello.pages, hello.page_size)
        scheduler = PrefillScheduler(hello.stages, pool, planner)
        leader = Leader(
            scheduler,
            pool,
            self.stage,
            model_digest=hello.model_digest,
            reply=self._reply,
            on_change=self.changed,
        )
        self._clients = [
            ControlClient(
                address,
                hello,
                keys,
                on_message=leader.from_stage,
                on_state=lambda state, peer, i=i: self._on_stage(i, state, peer),  # type: ignore[misc]
                resolver=resolver,
            )
            for i, address in enumerate(peers, start=1)
        ]
        self._chain = Chain(
            self._clients,
            self._member,
            layers=hello.layers,
            pages=hello.pages,
            on_formed=leader.formed,
            on_broken=self._on_broken,
        )
        leader.lead(self._chain)
        self.leader = leader
        self._publisher = Publisher(leader)

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind, and connect to the other stages. Raises OSError if the address is taken."""
        await self._server.start()
        self._tasks.spawn(self._others.watch(), "other ranks")
        for client in self._clients:
            client.start()
        if self.leader is not None and self._chain is not None and self._publisher is not None:
            self._tasks.spawn(self._chain.run(), "chain")
            self._tasks.spawn(self.leader.run(), "leader")
            self._tasks.spawn(self._publisher.run(self._load), "publisher")

    def changed(self) -> None:
        """Something happened here: a drain goes on, and routers are told soon."""
        self._moved.set()
        if self._publisher is not None:
            self._publisher.changed()

    async def drain(self, seconds: float) -> None:
        """Let the prompts in the pipeline end, for at most `seconds`.

        Decode workers are told first, and what they sent before they knew is carried out too. What
        is cut all the same is resumed by them from what was delivered.
        """
        self._server.announce()
        self.changed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.sleep(_NEWS_SECONDS)
                await self._finish()

    async def _finish(self) -> None:
        """Return when nothing is left to do here, and nothing more comes from the leader."""
        moves = True
        while moves:
            while self._busy():
                self._moved.clear()
                await self._moved.wait()
            moves = await self._moves_soon()

    def _busy(self) -> bool:
        if self.leader is None or self._chain is None:
            return self.stage.busy
        # Without all stages nothing can be carried out any more: the rest is cut now, not later.
        return self._chain.formed and (self.stage.busy or not self.leader.scheduler.idle)

    async def _moves_soon(self) -> bool:
        """Whether something happens before a leader with prompts would have sent its next plan."""
        if self._leader_session is None:
            return False
        self._moved.clear()
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                await self._moved.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop: no transfer of this process touches memory any more."""
        await self._tasks.cancel()
        for client in self._clients:
            await client.close()
        await self._server.close()
        await self._kv.close()
        await self.stage.end()
        await self._others.close()

    # --- messages ------------------------------------------------------------------------------

    def _on_join(self, session: Session) -> None:
        hello = session.hello
        if hello.role == "decode":
            self._sessions[_receiver(hello)] = session
        elif hello.role == "prefill":
            self._leader_session = session

    def _on_lost(self, session: Session) -> None:
        hello = session.hello
        if hello.role == "decode":
            receiver = _receiver(hello)
            self._sessions.pop(receiver, None)
            self._kv.receiver_lost(receiver)
            if self.leader is not None:
                self.leader.receiver_lost(receiver)
        elif session is self._leader_session:
            self._leader_session = None
            self._moved.set()
        if self._publisher is not None:
            self._publisher.unsubscribe(session)

    def _on_message(self, session: Session, message: Control) -> None:
        role = session.hello.role
        if role == "decode":
            self._from_decode(session, message)
        elif role == "prefill" and session is self._leader_session:
            self._from_leader(session, message)
        elif role == "router" and isinstance(message, Subscribe) and self._publisher is not None:
            self._publisher.subscribe(session, self._load())

    def _from_decode(self, session: Session, message: Control) -> None:
        receiver = _receiver(session.hello)
        if isinstance(message, OpenLink) and message.target.receiver == receiver:
            self._kv.open(message.target, session.send)
            if self.leader is not None:
                self.leader.drop_older(receiver, message.target.incarnation)
        elif isinstance(message, LinkEcho):
            self._kv.echo(receiver, message)
        elif isinstance(message, Revoke):
            self._kv.revoke(receiver, message, session.send)
            if self.leader is not None:
                self.leader.revoke(receiver, message.grant)
        elif isinstance(message, Prefill) and self.leader is not None:
            self.leader.prefill(receiver, message)

    def _from_leader(self, session: Session, message: Control) -> None:
        if isinstance(message, StepPlan):
            self.stage.submit(message)
            self._moved.set()
        elif isinstance(message, Prepare | Form):
            self._tasks.spawn(self._member.handle(message, session.send), "member")

    def _on_stage(self, stage: int, state: LinkState, hello: Hello | None) -> None:
        assert self._chain is not None
        self._chain.link_changed(stage, state, hello)

    def _on_broken(self, reason: str) -> None:
        assert self.leader is not None
        self.leader.broken(reason)

    def _to_leader(self, message: Message) -> None:
        if self.leader is not None:
            self.leader.from_stage(message)
            return
        self._moved.set()
        if self._leader_session is not None:
            with contextlib.suppress(LinkDown):
                self._leader_session.send(message)

    def _reply(self, receiver: str, message: Message) -> None:
        session = self._sessions.get(receiver)
        if session is not None:
            with contextlib.suppress(LinkDown):
                session.send(message)

    def _prompt_tokens(self, key: int, start: int, length: int) -> torch.Tensor:
        assert self.leader is not None
        return self.leader.prompt_tokens(key, start, length)

    def _load(self) -> Load:
        assert self.leader is not None
        return self.leader.load(self.state)

    @property
    def state(self) -> WorkerState:
        """What routers are told: a group that is not formed is still starting."""
        if self._health.state == "ready" and self._chain is not None and not self._chain.formed:
            return "starting"
        return self._health.state

    def describe(self) -> Mapping[str, object]:
        """Return the JSON of /state."""
        stats = self.stage.stats
        described: dict[str, object] = {
            "role": "prefill",
            "stage": self._hello.stage,
            "busy": self._busy(),
            "steps": stats.steps,
            "tokens": stats.tokens,
            "compute_seconds": stats.compute_seconds,
            "wait_seconds": stats.wait_seconds,
            "exposed_transfer_seconds": stats.exposed_transfer_seconds,
            "kv_bytes_written": self._kv.bytes_written,
            "kv_bytes_read": self._kv.bytes_read,
        }
        if self.leader is not None and self._chain is not None:
            counts = self.leader.pool.counts()
            described |= {
                "epoch": self._chain.epoch,
                "formed": self._chain.formed,
                "costs": [
                    msgspec.structs.asdict(cost) for cost in self.leader.scheduler.stage_costs()
                ],
                "layers_per_stage": self._chain.layers_per_stage,
                "pages": {name: getattr(counts, name) for name in counts.__slots__},
            }
        return described


def _receiver(hello: Hello) -> str:
    return f"{hello.name}/{hello.boot_id}"
