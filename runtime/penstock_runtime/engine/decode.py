"""The decode engine: requests in, tokens out; prompts prefilled here or by a group.

    routers ──Generate, Cancel──► DecodeEngine ──Tokens, Failed──► routers
                                    │     ▲
                     grants, Prefill│     │ KV pages delivered, grants cut
                                    ▼     │
                                  GroupLink, one a prefill group

What happens when is the scheduler's business; whose page is whose, the ledger's. Here both are
joined to the compute thread. The event loop's thread owns everything but the running batch. Where
the scheduler gives out two batches, the next lies ready while one runs, and is made anew if
something happens meanwhile: the compute thread goes on at once, and tokens are streamed beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from penstock_runtime.engine.group_link import GroupLink
from penstock_runtime.engine.sampler import SamplingRow
from penstock_runtime.scheduler.admission import Refused, Rejected, Remote
from penstock_runtime.scheduler.cost_model import Chunk
from penstock_wire import blocks
from penstock_wire.messages import (
    Failed,
    Generate,
    GroupAddress,
    KvEvents,
    Load,
    Message,
    Snapshot,
    WireError,
    unpack_tokens,
)
from penstock_wire.sockets import LinkDown
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from penstock_runtime.engine.compute import Compute, Work
    from penstock_runtime.engine.runner import DecodeRunner
    from penstock_runtime.kvcache.pool import PagePool
    from penstock_runtime.scheduler.batch import Batch, BatchSegment
    from penstock_runtime.scheduler.decode import DecodeScheduler
    from penstock_runtime.transfer.ownership import GrantLedger, Revocation
    from penstock_wire.messages import TokenOut, Tokens

log = logging.getLogger(__name__)


class Reply(Protocol):
    """Sends messages to the router that a request came from. Equal for its requests."""

    def __call__(self, *messages: Message) -> None:
        """Send them as one. Raises LinkDown if the router is gone."""
        ...


OpenGroup: TypeAlias = Callable[[GroupAddress, "DecodeEngine"], GroupLink]
FailureCode: TypeAlias = Literal[
    "overloaded", "draining", "too_long", "prefill_lost", "invalid", "internal"
]


def steps_out_on(device_type: str) -> int:
    """Return how many steps a decode worker gives out at a time (`DecodeSettings.steps_out`).

    A device would wait for the host. On the CPU the host's work, done beside a step, only takes
    cores from it: see the runtime's DESIGN.md.
    """
    return 2 if device_type == "cuda" else 1


@dataclass(slots=True)
class DecodeStats:
    """Counters since the start, for metrics."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    requests: int = 0
    remote_prefills: int = 0
    remote_cuts: int = 0
    compute_seconds: float = 0.0
    step_seconds: float = 0.0
    """A moving mean over the steps that only decoded: a prompt's chunk says nothing of a token."""

    def step(self, seconds: float, *, decoded_only: bool) -> None:
        """Count one step."""
        self.steps += 1
        self.compute_seconds += seconds
        if decoded_only:
            self.step_seconds += (seconds - self.step_seconds) * (0.1 if self.step_seconds else 1.0)


@dataclass(frozen=True, slots=True)
class _Client:
    owner: object
    """The router's session: when it is lost, its requests end."""
    reply: Reply


@dataclass(frozen=True, slots=True)
class _Step:
    """One that is computed, or lies ready for it."""

    batch: Batch
    work: Work[list[TokenOut]]


@dataclass(frozen=True, slots=True)
class _Granted:
    request_id: str
    group: str


class DecodeEngine:
    """One decode worker's requests.

    Args:
        scheduler, pool, ledger: of this worker; pool is theirs too.
        runner: the model, run on `compute`.
        model_digest: part of every block's hash.
        open_group: makes the link to a prefill group; this engine owns its grants.
        on_change: called after whatever happened was dealt with.
    """

    def __init__(
        self,
        *,
        scheduler: DecodeScheduler,
        pool: PagePool,
        ledger: GrantLedger,
        runner: DecodeRunner,
        compute: Compute,
        model_digest: str,
        open_group: OpenGroup,
        on_change: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self.pool = pool
        self.ledger = ledger
        self._runner = runner
        self._compute = compute
        self._model_digest = model_digest
        self._open_group = open_group
        self._on_change = on_change
        self._clients: dict[str, _Client] = {}
        self._salts: dict[str, bytes] = {}
        self._groups: dict[str, GroupLink] = {}
        self._grants: dict[int, _Granted] = {}
        self._steps: deque[_Step] = deque()
        self._closing = Tasks()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._draining = False
        self._event_seq = 0
        self.stats = DecodeStats()

    # --- routers -------------------------------------------------------------------------------

    def generate(self, message: Generate, owner: object, reply: Reply) -> None:
        """Take a request; its owner gets Tokens, or Failed."""
        request_id = message.request_id
        if self._draining:
            self._refuse(reply, request_id, "draining", "this worker is stopping", retriable=True)
            return
        try:
            prompt, output = unpack_tokens(message.tokens), unpack_tokens(message.output)
            end = self.scheduler.add(
                request_id,
                prompt,
                output,
                message.sampling,
                blocks.root_hash(self._model_digest, message.salt),
                group=message.group,
                force_group=message.force_group,
                now=time.monotonic(),
            )
        except Refused as refused:
            self._refuse(reply, request_id, refused.code, str(refused), retriable=refused.retriable)
            return
        except WireError as error:
            self._refuse(reply, request_id, "invalid", str(error), retriable=False)
            return
        if end is not None:
            _send(reply, end)
            return
        self._idle.clear()
        self.stats.requests += 1
        self.stats.prompt_tokens += len(prompt)
        self._clients[request_id] = _Client(owner, reply)
        self._salts[request_id] = message.salt
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a request that nobody waits for."""
        self._forget(request_id)
        delivered = 0
        for grant, granted in self._grants.items():
            if granted.request_id == request_id:
                delivered = self._revoke(grant)
                break
        self.scheduler.cancel(request_id, delivered)
        self._wake.set()

    def owner_lost(self, owner: object) -> None:
        """A router is gone: end its requests."""
        for request_id in [r for r, client in self._clients.items() if client.owner is owner]:
            self.cancel(request_id)

    def _revoke(self, grant: int) -> int:
        granted = self._grants.pop(grant)
        if not self.ledger.is_open(grant):
            return 0
        return self._groups[granted.group].revoke(grant).tokens

    def _forget(self, request_id: str) -> _Client | None:
        self._salts.pop(request_id, None)
        return self._clients.pop(request_id, None)

    def _fail(self, request_id: str, code: FailureCode, message: str, *, retriable: bool) -> None:
        client = self._forget(request_id)
        if client is not None:
            self._refuse(client.reply, request_id, code, message, retriable=retriable)

    @staticmethod
    def _refuse(
        reply: Reply, request_id: str, code: FailureCode, message: str, *, retriable: bool
    ) -> None:
        _send(reply, Failed(request_id=request_id, code=code, message=message, retriable=retriable))

    # --- prefill groups ------------------------------------------------------------------------

    def set_groups(self, groups: tuple[GroupAddress, ...]) -> None:
        """The prefill groups there are now: open links to new ones, close those that are gone."""
        wanted = {group.name: group for group in groups}
        for name, link in list(self._groups.items()):
            if wanted.get(name) != link.group:
                del self._groups[name]
                self._closing.spawn(link.close(), f"end of the links to {name}")
        for name, group in wanted.items():
            if name not in self._groups:
                self._groups[name] = self._open_group(group, self)
                self._groups[name].start()
        self._wake.set()

    @property
    def groups_ready(self) -> tuple[str, ...]:
        """Groups that prompts can be sent to."""
        return tuple(sorted(name for name, link in self._groups.items() if link.ready))

    @property
    def fences(self) -> int:
        """Fences since the start, over the groups there are."""
        return sum(link.fences for link in self._groups.values())

    def prefill_complete(self, grant: int, reused: int) -> None:
        """See `GrantOwner`."""
        granted = self._grants.pop(grant, None)
        if granted is not None:
            self.scheduler.remote_done(granted.request_id, reused)
        self._wake.set()

    def prefill_cut(self, cut: Revocation, reason: str) -> None:
        """See `GrantOwner`."""
        granted = self._grants.pop(cut.grant, None)
        if granted is not None:
            self.stats.remote_cuts += 1
            log.warning(
                "the prefill of %s was cut at token %d: %s", granted.request_id, cut.tokens, reason
            )
            self.scheduler.remote_failed(granted.request_id, cut.tokens)
        self._wake.set()

    def group_changed(self) -> None:
        """See `GrantOwner`."""
        self._wake.set()

    # --- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Admit, compute and stream for ever.

        Raises RankLost or DeviceFailed: this worker must end. Requests are not told: their routers
        lose the worker and send them to another.
        """
        while True:
            self._wake.clear()
            await self._finish()
            self._reconsider()
            self._admit()
            self._give_out()
            self._on_change()
            await self._sleep()

    async def _finish(self) -> None:
        """Stream what the steps that have ended gave."""
        while self._steps and self._steps[0].work.ended:
            step = self._steps[0]
            try:
                timed = step.work.result()
            except (RuntimeError, ValueError) as error:
                log.exception("a step failed")
                await self._fail_steps(error)
                return
            self._steps.popleft()
            seconds, batch = timed.end - timed.begin, step.batch
            self.scheduler.cost.observe(batch.chunks, seconds)
            self.stats.step(seconds, decoded_only=batch.tokens == len(batch.segments))
            self._stream(batch, timed.result)

    async def _fail_steps(self, error: Exception) -> None:
        """A step failed. The one behind it was to go on with what it gave."""
        if not self._steps[-1].work.withdraw():
            await self._compute.settle()
        self._steps.clear()
        for request_id in self.scheduler.abort_steps():
            message = f"the model could not be computed: {error}"
            self._fail(request_id, "internal", message[:1000], retriable=False)

    def _reconsider(self) -> None:
        """Something has happened: plan the step anew that has not begun."""
        if len(self._steps) > 1 and self._steps[-1].work.withdraw():
            self.scheduler.withdraw_step(self._steps.pop().batch)

    def _give_out(self) -> None:
        """Have the next step computed, or two: one of them as soon as the other has ended."""
        while self.scheduler.room_for_step:
            batch = self.scheduler.next_batch()
            if batch is None:
                return
            rows = [self._row(segment) for segment in batch.sampled]
            work = self._compute.give(partial(self._runner.step, batch, rows), self._wake.set)
            self._steps.append(_Step(batch, work))

    async def _sleep(self) -> None:
        if self.scheduler.idle:
            self._idle.set()
        # The end of a step wakes as well.
        deadline = self.scheduler.next_deadline()
        if deadline is None:
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._wake.wait()

    def _admit(self) -> None:
        for admission in self.scheduler.plan_admission(time.monotonic(), self.groups_ready):
            if isinstance(admission, Rejected):
                self._fail(
                    admission.request_id,
                    admission.code,
                    admission.message,
                    retriable=admission.retriable,
                )
            elif isinstance(admission, Remote):
                self._send_away(admission)

    def _send_away(self, remote: Remote) -> None:
        try:
            grant = self._groups[remote.group].prefill(
                remote.request_id,
                remote.tokens,
                remote.cached,
                remote.pages,
                self._salts[remote.request_id],
            )
        except LinkDown as error:
            log.info("%s", error)
            self._take_back(remote)
            return
        self.stats.remote_prefills += 1
        self._grants[grant] = _Granted(remote.request_id, remote.group)

    def _take_back(self, remote: Remote) -> None:
        """Nothing was granted: all pages of the request are still its own."""
        fresh = remote.pages[remote.cached // self.pool.page_size :]
        self.scheduler.remote_failed(remote.request_id, remote.cached)
        self.pool.release(fresh)

    def _row(self, segment: BatchSegment) -> SamplingRow:
        request = self.scheduler.get(segment.request_id)
        assert request is not None
        return SamplingRow(
            request.sampling, request.tokens, request.prompt_length, segment.position
        )

    def _stream(self, batch: Batch, sampled: list[TokenOut]) -> None:
        answers: dict[Reply, list[Tokens]] = {}
        for tokens in self.scheduler.complete_step(batch, sampled):
            self.stats.tokens += len(tokens.tokens)
            client = self._clients.get(tokens.request_id)
            if tokens.finish:
                self.stats.cached_tokens += tokens.cached_tokens
                self._forget(tokens.request_id)
            if client is not None:
                answers.setdefault(client.reply, []).append(tokens)
        for reply, together in answers.items():
            _send(reply, *together)

    # --- ends ----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Take no new requests, let those here end, and hand the rest back after `seconds`."""
        self._draining = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        for request_id in list(self._clients):
            client = self._clients[request_id]
            self.cancel(request_id)
            self._refuse(
                client.reply, request_id, "draining", "this worker is stopping", retriable=True
            )

    async def close(self) -> None:
        """End every link. Call it when `run` has ended."""
        self.set_groups(())
        await self._closing.settle()
        await self._compute.settle()

    # --- what routers want to know -------------------------------------------------------------

    def events(self) -> KvEvents | Snapshot | None:
        """Return the blocks stored and evicted since the last call, if any."""
        stored, evicted = self.pool.drain_events()
        if not stored and not evicted:
            return None
        self._event_seq += 1
        return KvEvents(seq=self._event_seq, stored=b"".join(stored), evicted=b"".join(evicted))

    def snapshot(self) -> Snapshot:
        """Return all blocks. Events that were not sent yet are in it: call `events` first."""
        return Snapshot(seq=self._event_seq, hashes=b"".join(self.pool.snapshot()))

    def load(self, state: Literal["starting", "ready", "draining"]) -> Load:
        """Return how busy this worker is."""
        load = self.scheduler.load()
        cost = self.scheduler.cost.cost
        context = self.pool.page_size * max(1, self.pool.counts().resident)
        typical = Chunk(context // max(1, load.running), 1)
        return Load(
            state=state,
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            queued_seconds=round(load.queued_seconds, 4),
            pages_free=self.pool.available(),
            pages_total=self.pool.total,
            cost=self.scheduler.cost.export(),
            step_seconds=round(self.stats.step_seconds, 6),
            step_seconds_per_request=round(cost.step([typical, typical]) - cost.step([typical]), 6),
            groups_ready=self.groups_ready,
        )


def _send(reply: Reply, *messages: Message) -> None:
    # A router that is gone is reported by its link; its requests are cancelled then.
    with contextlib.suppress(LinkDown):
        reply(*messages)
