"""The decode worker: control server and engine of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_runtime.engine.decode import DecodeEngine
from penstock_runtime.engine.group_link import GroupLink, incarnations
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.decode import DecodeScheduler
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_runtime.worker.publisher import Publisher
from penstock_wire.messages import Cancel, Generate, Groups, Subscribe
from penstock_wire.sockets import ControlServer, Session
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.engine.runner import DecodeRunner
    from penstock_runtime.scheduler.decode import DecodeSettings
    from penstock_runtime.transfer.base import Transfer
    from penstock_runtime.transfer.page_ranges import KvArena
    from penstock_runtime.worker.http import Health
    from penstock_runtime.worker.other_ranks import OtherRanks
    from penstock_wire.keys import Keys
    from penstock_wire.messages import Control, GroupAddress, Hello, Load
    from penstock_wire.names import Resolver


class DecodeWorker:
    """Control server and engine.

    Args:
        hello: who this worker is.
        bind: of the control server.
        arenas: the KV pool's memory, all layers; one a rank.
        others: the worker's other ranks.
    """

    def __init__(
        self,
        *,
        hello: Hello,
        bind: str,
        keys: Keys,
        resolver: Resolver,
        health: Health,
        runner: DecodeRunner,
        compute: Compute,
        transfer: Transfer,
        arenas: Sequence[KvArena],
        others: OtherRanks,
        settings: DecodeSettings,
    ) -> None:
        self._hello = hello
        self._keys = keys
        self._resolver = resolver
        self._health = health
        self._transfer = transfer
        self._arenas = arenas
        self._others = others
        self._incarnations = incarnations()
        pool = PagePool(hello.pages, hello.page_size)
        self._ledger = GrantLedger(pool)
        self.engine = DecodeEngine(
            scheduler=DecodeScheduler(pool, hello.max_model_len, settings),
            pool=pool,
            ledger=self._ledger,
            runner=runner,
            compute=compute,
            model_digest=hello.model_digest,
            open_group=self._open_group,
            on_change=self.changed,
        )
        self._publisher = Publisher(self.engine)
        self._tasks = Tasks()
        self._server = ControlServer(
            bind,
            hello=lambda: hello,
            keys=keys,
            on_message=self._on_message,
            on_join=lambda _: None,
            on_lost=self._on_lost,
            state=lambda: health.state,
        )

    def _open_group(self, group: GroupAddress, owner: DecodeEngine) -> GroupLink:
        return GroupLink(
            group,
            hello=self._hello,
            keys=self._keys,
            resolver=self._resolver,
            transfer=self._transfer,
            arenas=self._arenas,
            ledger=self._ledger,
            incarnations=self._incarnations,
            owner=owner,
        )

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind and serve. Raises OSError if the address is taken."""
        await self._server.start()
        self._tasks.spawn(self._others.watch(), "other ranks")
        self._tasks.spawn(self.engine.run(), "decode engine")
        self._tasks.spawn(self._publisher.run(self._load), "publisher")

    def changed(self) -> None:
        """Something happened here: routers are told soon."""
        self._publisher.changed()

    async def drain(self, seconds: float) -> None:
        """Let the requests here end; hand the rest back after `seconds`."""
        self._publisher.publish(self._load())
        await self.engine.drain(seconds)

    async def close(self) -> None:
        """Stop: no transfer of this process touches memory any more."""
        await self._tasks.cancel()
        await self.engine.close()
        await self._server.close()
        await self._others.close()

    # --- messages ------------------------------------------------------------------------------

    def _on_message(self, session: Session, message: Control) -> None:
        if session.hello.role != "router":
            return
        if isinstance(message, Generate):
            self.engine.generate(message, session, session.send)
        elif isinstance(message, Cancel):
            self.engine.cancel(message.request_id)
        elif isinstance(message, Groups):
            self.engine.set_groups(message.groups)
        elif isinstance(message, Subscribe):
            self._publisher.subscribe(session, self._load())

    def _on_lost(self, session: Session) -> None:
        self._publisher.unsubscribe(session)
        self.engine.owner_lost(session)

    def _load(self) -> Load:
        return self.engine.load(self._health.state)

    def describe(self) -> Mapping[str, object]:
        """Return the JSON of /state."""
        engine, stats = self.engine, self.engine.stats
        counts, load = engine.pool.counts(), engine.scheduler.load()
        return {
            "role": "decode",
            "busy": not engine.scheduler.idle,
            "running": load.running,
            "waiting": load.waiting,
            "groups_ready": list(engine.groups_ready),
            "fences": engine.fences,
            "preemptions": engine.scheduler.preemptions,
            "dropped_notifications": dict(self._ledger.dropped),
            "steps": stats.steps,
            "tokens": stats.tokens,
            "requests": stats.requests,
            "remote_prefills": stats.remote_prefills,
            "remote_cuts": stats.remote_cuts,
            "arriving": [
                {"delivered": delivered, "tokens": tokens}
                for delivered, tokens in self._ledger.progress()
            ],
            "compute_seconds": stats.compute_seconds,
            "pages": {name: getattr(counts, name) for name in counts.__slots__},
        }
