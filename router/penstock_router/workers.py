"""The fleet: a link to every decode worker and to stage 0 of every prefill group.

It follows discovery, tells the decode workers which groups there are, keeps what the workers
publish (Hello, Load, KV events), and answers the one question that the proxy has: who takes this
prompt. Everything runs in the event loop's thread, so no state needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from penstock_router import policy
from penstock_router.calls import Calls
from penstock_wire.blocks import block_hashes, root_hash, split_hashes
from penstock_wire.messages import (
    Control,
    Failed,
    GroupAddress,
    Groups,
    Hello,
    KvEvents,
    Load,
    Message,
    Snapshot,
    Subscribe,
    Tokens,
)
from penstock_wire.sockets import LinkDown, LinkState
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Iterable

    from penstock_router.discovery import Discovery, Endpoint
    from penstock_router.links import LinkFactory, WorkerLink
    from penstock_router.policy import Choice, Demand
    from penstock_router.prefix_index import PrefixIndex

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Worker:
    """What is known of one worker process."""

    endpoint: Endpoint
    link: WorkerLink = field(init=False)
    calls: Calls = field(init=False)
    boot_id: str = ""
    load: Load | None = None
    seq: int | None = None
    """The last KV event applied; None until a snapshot came."""
    routed: int = 0
    """Requests sent since the last Load, which cannot include them."""
    routed_seconds: float = 0.0
    routed_pages: int = 0
    retired: bool = False
    """Discovery does not list it any more: it ends its streams and gets no new ones."""

    @property
    def name(self) -> str:
        """The worker's name; for prefill workers see `endpoint.group` too."""
        return self.endpoint.name

    @property
    def hello(self) -> Hello:
        """The last Hello. Only of a worker that said one."""
        hello = self.link.hello
        assert hello is not None, f"{self.name} has not said hello"
        return hello

    @property
    def ready(self) -> bool:
        """Whether it takes new work: connected, not draining, and says so itself."""
        return (
            not self.retired
            and self.link.state is LinkState.READY
            and self.link.hello is not None
            and self.load is not None
            and self.load.state == "ready"
        )

    def account(self, *, seconds: float, pages: int) -> None:
        """Remember work that the next Load will include."""
        self.routed += 1
        self.routed_seconds += seconds
        self.routed_pages += pages


class Prompt:
    """A prompt to place: its tokens, and its block hashes as each model and page size asks."""

    def __init__(self, tokens: bytes, salt: bytes = b"") -> None:
        self.tokens = tokens
        self.salt = salt
        self._hashes: dict[tuple[str, int], list[bytes]] = {}

    def hashes(self, hello: Hello) -> list[bytes]:
        """Return the hashes of the full blocks, as the worker that said `hello` has them."""
        if not hello.page_size:
            return []
        key = hello.model_digest, hello.page_size
        if key not in self._hashes:
            root = root_hash(hello.model_digest, self.salt)
            self._hashes[key] = block_hashes(root, self.tokens, hello.page_size)
        return self._hashes[key]


class Fleet:
    """All workers.

    Args:
        discovery: where they are.
        connect: makes a link to an address.
        hello: who the router is, sent again when a worker's own Hello must be renewed.
        index: which worker holds which blocks.
        rng: breaks ties.
        require_prefill: whether requests are to have a prefill group.
        group_wait: seconds without any, after which requests go to decode workers alone.
    """

    def __init__(
        self,
        discovery: Discovery,
        connect: LinkFactory,
        *,
        hello: Hello,
        index: PrefixIndex,
        rng: random.Random,
        require_prefill: bool,
        group_wait: float = 10.0,
    ) -> None:
        self.index = index
        self.require_prefill = require_prefill
        self._group_wait = group_wait
        self._groupless_since: float | None = time.monotonic()
        self._discovery = discovery
        self._connect = connect
        self._hello = hello
        self._rng = rng
        self._workers: dict[str, Worker] = {}
        self._retired: set[Worker] = set()
        self._endpoints: tuple[Endpoint, ...] = ()
        self._groups = Groups(groups=())
        self._changed = asyncio.Event()
        self._closing = Tasks()

    # --- lifetime -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow discovery for ever."""
        async for endpoints in self._discovery.watch():
            self._follow(endpoints)

    async def close(self) -> None:
        """Close all links."""
        workers = [*self._workers.values(), *self._retired]
        self._workers.clear()
        self._retired.clear()
        await asyncio.gather(*(worker.link.close() for worker in workers))
        await self._closing.settle()

    async def changed(self, timeout: float) -> bool:  # noqa: ASYNC109 - a deadline on an event
        """Wait until a worker's state changed, or `timeout` seconds; returns whether it did."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await event.wait()
        return event.is_set()

    def _notify(self) -> None:
        if self._any_pair():
            self._groupless_since = None
        elif self._groupless_since is None:
            self._groupless_since = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    # --- questions ----------------------------------------------------------------------------

    @property
    def workers(self) -> list[Worker]:
        """All workers with a link, those that only end their streams too."""
        return [*self._workers.values(), *self._retired]

    def decode_workers(self) -> list[Worker]:
        """Return the decode workers that take new work."""
        return [w for w in self._workers.values() if w.endpoint.role == "decode" and w.ready]

    def prefill_groups(self) -> dict[str, Worker]:
        """Return stage 0 of the prefill groups that take new work, by group."""
        return {
            w.endpoint.group: w
            for w in self._workers.values()
            if w.endpoint.role == "prefill" and w.ready
        }

    def lists(self, role: Literal["decode", "prefill"]) -> bool:
        """Return whether discovery lists any worker of `role`, whatever its state."""
        return any(endpoint.role == role for endpoint in self._endpoints)

    @property
    def discovery_problem(self) -> str:
        """Why discovery cannot tell who is there now, empty if it can."""
        return self._discovery.problem

    def _any_pair(self) -> bool:
        """Return whether some decode worker has links to all stages of some ready group."""
        groups = self.prefill_groups().keys()
        return any(w.load and groups & set(w.load.groups_ready) for w in self.decode_workers())

    def alone_at(self) -> float | None:
        """Return when requests may go to decode workers alone, in monotonic seconds.

        A request is not to be lost for want of a prefill group: decode workers hold all layers.
        None while a group can be used.
        """
        if not self.require_prefill:
            return 0.0
        since = self._groupless_since
        return None if since is None else since + self._group_wait

    def context_limit(self) -> int | None:
        """Return the tokens that fit on every decode worker, output included; None if unknown."""
        limits: list[int] = []
        for worker in self.decode_workers():
            load = worker.load
            assert load is not None
            room = load.pages_total * worker.hello.page_size
            limits += [limit for limit in (worker.hello.max_model_len, room) if limit]
        return min(limits, default=None)

    def queued_seconds(self) -> float:
        """Return the shortest published queue of whoever prefills, in seconds."""
        groups = self.prefill_groups().values()
        return min(
            (w.load.queued_seconds for w in groups or self.decode_workers() if w.load), default=0.0
        )

    def choose(self, prompt: Prompt, demand: Demand, *, avoid: Collection[str]) -> Choice | None:
        """Return who takes the prompt, and account for it; None if nobody can now.

        Workers named in `avoid` are left out.
        """
        found: dict[int, dict[str, int]] = {}

        def cached(worker: Worker) -> int:
            hashes = prompt.hashes(worker.hello)
            if id(hashes) not in found:
                found[id(hashes)] = self.index.longest_prefix(hashes)
            return found[id(hashes)].get(worker.name, 0) * worker.hello.page_size

        decodes = [_decode(w, cached(w)) for w in self.decode_workers() if w.name not in avoid]
        stages = self.prefill_groups()
        groups = [_group(name, worker, cached(worker)) for name, worker in stages.items()]
        alone_at = self.alone_at()
        alone = alone_at is not None and alone_at <= time.monotonic()
        choice = policy.choose(demand, decodes, groups, require_prefill=not alone, rng=self._rng)
        if choice is not None:
            self._account(choice, prompt, stages.get(choice.group))
        return choice

    def _account(self, choice: Choice, prompt: Prompt, stage: Worker | None) -> None:
        decode = self._workers[choice.decode]
        own = choice.prefill_seconds if stage is None else 0.0
        decode.account(seconds=own, pages=choice.pages)
        self.index.predict(decode.name, prompt.hashes(decode.hello))
        if stage is not None:
            stage.account(seconds=choice.prefill_seconds, pages=0)
            self.index.predict(stage.name, prompt.hashes(stage.hello))

    def worker(self, name: str) -> Worker:
        """Return the worker called `name`. Raises LinkDown if there is none."""
        try:
            return self._workers[name]
        except KeyError:
            raise LinkDown(f"{name} is not in the fleet any more") from None

    # --- discovery ----------------------------------------------------------------------------

    def _follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._endpoints = endpoints
        wanted = {e.name: e for e in endpoints if e.role == "decode" or e.stage == 0}
        for name, worker in list(self._workers.items()):
            if wanted.get(name) != worker.endpoint:
                self._retire(self._workers.pop(name))
        for name, endpoint in wanted.items():
            if name not in self._workers:
                self._workers[name] = self._join(endpoint)
        self._announce()
        self._notify()

    def _join(self, endpoint: Endpoint) -> Worker:
        log.info("%s worker %s at %s", endpoint.role, endpoint.name, endpoint.address)
        worker = Worker(endpoint)
        worker.link = self._connect(
            endpoint.address,
            lambda message: self._on_message(worker, message),
            lambda state, hello: self._on_state(worker, state, hello),
        )
        worker.calls = Calls(worker.link)
        worker.link.start()
        return worker

    def _retire(self, worker: Worker) -> None:
        log.info("worker %s is not listed any more", worker.name)
        worker.retired = True
        self.index.drop(worker.name)
        self._retired.add(worker)
        self.release(worker)

    def release(self, worker: Worker) -> None:
        """Close the link of a retired worker once it has no calls."""
        if worker in self._retired and not len(worker.calls):
            self._retired.discard(worker)
            self._closing.spawn(worker.link.close(), f"end of the link to {worker.name}")

    def _announce(self) -> None:
        """Tell every decode worker the groups, if they changed."""
        groups = Groups(groups=tuple(self._complete_groups()))
        if groups == self._groups:
            return
        self._groups = groups
        for worker in self._workers.values():
            if worker.endpoint.role == "decode":
                _try_send(worker, groups)

    def _complete_groups(self) -> Iterable[GroupAddress]:
        """Yield the groups of which every stage is listed.

        How many stages a group has is known once its stage 0 said Hello; until then a gapless list
        counts as whole, so that a group whose stage 0 is dead stays known to the decode workers,
        which must still revoke grants at the other stages.
        """
        stages: dict[str, dict[int, Endpoint]] = {}
        for endpoint in self._endpoints:
            if endpoint.role == "prefill":
                stages.setdefault(endpoint.group, {})[endpoint.stage] = endpoint
        for name, members in sorted(stages.items()):
            count = len(members)
            first = self._workers.get(members[0].name) if 0 in members else None
            if first is not None and first.link.hello is not None:
                count = first.link.hello.stages
            if sorted(members) == list(range(count)):
                addresses = tuple(members[stage].address for stage in range(count))
                yield GroupAddress(name=name, stages=addresses)

    # --- what workers say ---------------------------------------------------------------------

    def _on_state(self, worker: Worker, state: LinkState, hello: Hello | None) -> None:
        log.info("worker %s is %s", worker.name, state.value)
        if state is LinkState.LOST:
            worker.load = None
            worker.seq = None
            worker.calls.lose(f"worker {worker.name} was lost")
            self.release(worker)
        elif state is LinkState.READY and hello is not None and not worker.retired:
            self._greet(worker, hello)
        self._notify()

    def _greet(self, worker: Worker, hello: Hello) -> None:
        if hello.boot_id != worker.boot_id:
            worker.boot_id = hello.boot_id
            self.index.drop(worker.name)
        if worker.endpoint.role == "decode":
            _try_send(worker, self._groups)
        else:
            self._announce()
        self._subscribe(worker)

    def _subscribe(self, worker: Worker) -> None:
        worker.seq = None
        _try_send(worker, Subscribe())

    def _on_message(self, worker: Worker, message: Control) -> None:
        match message:
            case Tokens() | Failed():
                worker.calls.deliver(message)
            case Load() | KvEvents() | Snapshot() if worker.retired:
                pass  # its name may belong to a successor already
            case Load():
                self._on_load(worker, message)
            case KvEvents():
                self._on_events(worker, message)
            case Snapshot():
                self._on_snapshot(worker, message)
            case _:
                log.warning("worker %s sent an unexpected %s", worker.name, type(message).__name__)

    def _on_load(self, worker: Worker, load: Load) -> None:
        before = worker.load
        worker.load = load
        worker.routed = worker.routed_pages = 0
        worker.routed_seconds = 0.0
        became_ready = load.state == "ready" and (before is None or before.state != "ready")
        if became_ready and (before is not None or not worker.hello.pages):
            # While it loaded its model, its Hello could not tell the KV layout and pages yet.
            _try_send(worker, self._hello)
            self._subscribe(worker)
        self._notify()

    def _on_snapshot(self, worker: Worker, message: Snapshot) -> None:
        worker.seq = message.seq
        fits = self.index.replace(worker.name, _hashes(worker, message.hashes), worker.hello.pages)
        self._check_fits(worker, fits=fits)

    def _on_events(self, worker: Worker, message: KvEvents) -> None:
        if worker.seq is None or message.seq <= worker.seq:
            return  # before the snapshot that is on its way, or included in the one that came
        if message.seq != worker.seq + 1:
            log.warning(
                "worker %s: KV event %d after %d; asking for a snapshot",
                worker.name,
                message.seq,
                worker.seq,
            )
            self._subscribe(worker)
            return
        worker.seq = message.seq
        fits = self.index.update(
            worker.name,
            _hashes(worker, message.stored),
            _hashes(worker, message.evicted),
            worker.hello.pages,
        )
        self._check_fits(worker, fits=fits)

    def _check_fits(self, worker: Worker, *, fits: bool) -> None:
        if not fits:
            log.warning(
                "worker %s reports more blocks than its %d pages; the rest is not indexed",
                worker.name,
                worker.hello.pages,
            )


def _try_send(worker: Worker, message: Message) -> None:
    """Send, or leave it: when the link is up again, everything is said anew."""
    with contextlib.suppress(LinkDown):
        worker.link.send(message)


def _hashes(worker: Worker, joined: bytes) -> list[bytes]:
    try:
        return list(split_hashes(joined))
    except ValueError as error:
        log.warning("worker %s sent a malformed KV event: %s", worker.name, error)
        return []


def _decode(worker: Worker, cached: int) -> policy.DecodeCandidate:
    assert worker.load is not None
    return policy.DecodeCandidate(
        name=worker.name,
        load=worker.load,
        kv_layout=worker.hello.kv_layout,
        model_digest=worker.hello.model_digest,
        page_size=worker.hello.page_size,
        cached_tokens=cached,
        routed=worker.routed,
        routed_seconds=worker.routed_seconds,
        routed_pages=worker.routed_pages,
    )


def _group(name: str, worker: Worker, cached: int) -> policy.GroupCandidate:
    assert worker.load is not None
    return policy.GroupCandidate(
        name=name,
        load=worker.load,
        kv_layout=worker.hello.kv_layout,
        model_digest=worker.hello.model_digest,
        cached_tokens=cached,
        routed_seconds=worker.routed_seconds,
    )
