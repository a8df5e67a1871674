"""A prefill stage: carries out the plans of stage 0, in order, and decides nothing.

For each step it takes in the activations of the stage before (stage 0 embeds tokens instead), runs
its layers over every chunk of the plan, hands the result on, and writes the chunk's KV into the
decode worker's pages. Sends and receives run beside the compute of neighbouring steps; only pages
that are still being loaded, and a ring without a free slot, make it wait.

One step is ready while another one computes: its inputs are there and it is with the compute
thread, which goes from one to the other without the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.timeline import SpanChunk, StepRecorder
from penstock_runtime.errors import PipelineBroken
from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.transfer.base import TransferError
from penstock_wire.messages import Admit, Message, Released, StageFault, StepDone, StepPlan
from penstock_wire.tasks import Tasks, start

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from penstock_runtime.engine.compute import Compute, Timed
    from penstock_runtime.engine.ring import ActivationRing

log = logging.getLogger(__name__)

ToLeader: TypeAlias = Callable[[Message], None]
PromptTokens: TypeAlias = Callable[[int, int, int], torch.Tensor]
"""(key, start, length) → token ids; only stage 0 has it."""


class ChunkRunner(Protocol):
    """Runs this stage's layers; called on the compute thread."""

    page_size: int

    def run(self, hidden_or_tokens: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """Return the hidden states behind this stage's layers, (tokens, hidden)."""
        ...


class KvPort(Protocol):
    """The links to decode workers, see `kv_writer.KvWriter`."""

    async def push(self, admit: Admit, first: int, last: int, start: int, end: int) -> None:
        """Write page positions [first, last) and announce tokens [start, end)."""
        ...

    async def load(self, admit: Admit, first: int, last: int) -> None:
        """Read page positions [first, last) from the receiver."""
        ...

    def finish(self, admit: Admit) -> None:
        """Nothing more will be pushed or loaded for this request."""
        ...


@dataclass(slots=True, eq=False)
class _Request:
    admit: Admit
    failed: bool = False
    load: asyncio.Task[None] | None = None
    """Must have ended before the first chunk is computed."""
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)
    """Reads and writes on its pages: they must end before the pages are reused."""


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A plan that is being carried out."""

    plan: StepPlan
    planned: float
    """When the stage turned to it."""
    computing: asyncio.Task[Timed[torch.Tensor]] | None
    """None if it computes nothing."""


_AHEAD = 2
"""Steps with the compute thread: one that runs and one that is ready. Each takes memory for its
inputs."""


@dataclass(slots=True)
class StageStats:
    """Counters since the start, for metrics. Seconds."""

    steps: int = 0
    tokens: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Time with nothing to compute while a plan was there: the bubble."""
    exposed_transfer_seconds: float = 0.0
    """Between the end of a prompt's last chunk and the arrival of its KV: what of the transfer is
    not hidden behind compute."""

    def count(self, tokens: int, done: StepDone) -> None:
        """Add one step."""
        self.steps += 1
        self.tokens += tokens
        self.compute_seconds += done.compute_seconds
        self.wait_seconds += done.wait_seconds


class PrefillStage:
    """One stage's step loop, for one epoch at a time.

    Args:
        stage: 0-based; `stages` in the group.
        runner: this stage's layers.
        compute: the thread they run on.
        ring: the neighbours.
        kv: the decode workers.
        to_leader: sends StepDone, Released and StageFault to stage 0.
        prompt_tokens: stage 0's source of token ids; None elsewhere.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        *,
        runner: ChunkRunner,
        compute: Compute,
        ring: ActivationRing,
        kv: KvPort,
        to_leader: ToLeader,
        prompt_tokens: PromptTokens | None,
    ) -> None:
        self._stage = stage
        self._last = stage == stages - 1
        self._runner = runner
        self._compute = compute
        self._ring = ring
        self._kv = kv
        self._to_leader = to_leader
        self._prompt_tokens = prompt_tokens
        self._page_size = runner.page_size
        self._epoch = 0
        self._plans: asyncio.Queue[StepPlan] = asyncio.Queue()
        self._requests: dict[int, _Request] = {}
        self._tasks = Tasks()
        self._loops: list[asyncio.Task[None]] = []
        self._computing: set[asyncio.Task[Timed[torch.Tensor]]] = set()
        self.stats = StageStats()
        self.timeline = StepRecorder(stage)

    @property
    def busy(self) -> bool:
        """Whether a plan is being carried out, or a page is in flight."""
        return bool(self._requests) or not self._plans.empty()

    def begin(self, epoch: int) -> None:
        """Carry out the plans of `epoch` from now on. The epoch before has been ended."""
        self._epoch = epoch
        self._plans = asyncio.Queue()
        begun: asyncio.Queue[_Begun] = asyncio.Queue()
        room = asyncio.Semaphore(_AHEAD)
        self._loops = [
            start(self._begin_all(self._plans, begun, room), f"steps of stage epoch {epoch}"),
            start(self._finish_all(begun, room), f"results of stage epoch {epoch}"),
        ]

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; one of another epoch is dropped."""
        if plan.epoch == self._epoch and self._loops:
            self._plans.put_nowait(plan)

    async def end(self) -> None:
        """End the epoch: when this returns nothing of it computes, reads or writes any more.

        The ring was closed by the caller, or is by this. Pages keep their contents.
        """
        await self._ring.close()
        ending = [*self._loops, *self._computing]
        for task in ending:
            # A step that waits for its turn on the compute thread is given up.
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._loops = []
        await self._compute.settle()
        await self._tasks.settle()
        self._requests.clear()

    async def _begin_all(
        self,
        plans: asyncio.Queue[StepPlan],
        begun: asyncio.Queue[_Begun],
        room: asyncio.Semaphore,
    ) -> None:
        """Give the plans' steps to the compute thread as soon as they can be computed."""
        with contextlib.suppress(PipelineBroken):
            while True:
                plan = await plans.get()
                planned = time.perf_counter()
                for admit in plan.admit:
                    self._admit(admit)
                computing = None
                if plan.items:
                    await room.acquire()
                    computing = await self._compute_step(plan)
                begun.put_nowait(_Begun(plan, planned, computing))

    async def _finish_all(self, begun: asyncio.Queue[_Begun], room: asyncio.Semaphore) -> None:
        """Do in order what follows from each plan's step, or from its releases."""
        idle_since = 0.0
        while True:
            step = await begun.get()
            if step.computing is not None:
                computed = await step.computing
                room.release()
                self._computed(step.plan, max(step.planned, idle_since), computed)
                idle_since = computed.end
            if step.plan.release:
                self._release(step.plan.release)

    def _admit(self, admit: Admit) -> None:
        request = _Request(admit)
        self._requests[admit.key] = request
        first, last = admit.load
        if last > first:
            request.load = self._track(request, self._kv.load(admit, first, last))
        # Pages that this group has in its cache and the receiver lacks. Blocks enter the cache
        # only when all stages have computed or loaded them, so they can be sent at once.
        cached = admit.start // self._page_size
        if cached > admit.send_from:
            self._push(request, admit.send_from * self._page_size, admit.start)

    def _push(self, request: _Request, start: int, end: int) -> None:
        """Send the KV of tokens [start, end), or the part of it that the receiver lacks."""
        admit = request.admit
        first = max(start // self._page_size, admit.send_from)
        last = pages_for(end, self._page_size)
        if request.failed or first >= last:
            return
        start = max(start, first * self._page_size)
        self._track(request, self._kv.push(admit, first, last, start, end))

    def _track(
        self, request: _Request, operation: Coroutine[object, object, None]
    ) -> asyncio.Task[None]:
        """Run a read or write on the request's pages; its failure fails the request alone."""
        task = self._tasks.spawn(self._guarded(request, operation), "KV transfer")
        request.in_flight.add(task)
        task.add_done_callback(request.in_flight.discard)
        return task

    async def _guarded(self, request: _Request, operation: Coroutine[object, object, None]) -> None:
        try:
            await operation
        except TransferError as error:
            self._fail(request, str(error))

    def _fail(self, request: _Request, message: str) -> None:
        if not request.failed:
            request.failed = True
            key = request.admit.key
            self._to_leader(
                StageFault(epoch=self._epoch, stage=self._stage, key=key, message=message)
            )

    async def _compute_step(self, plan: StepPlan) -> asyncio.Task[Timed[torch.Tensor]]:
        """Return the step's computation when all that it reads is there."""
        if self._prompt_tokens is None:
            inputs = await self._ring.receive(sum(item.length for item in plan.items))
        else:
            inputs = torch.cat([self._prompt_tokens(i.key, i.start, i.length) for i in plan.items])
        for item in plan.items:
            if (load := self._requests[item.key].load) is not None:
                # Not `await load`: the end of the epoch must not cancel a read under way.
                await asyncio.wait({load})
        segments = [
            Segment(start=i.start, length=i.length, pages=self._requests[i.key].admit.pages)
            for i in plan.items
        ]
        computing = asyncio.create_task(self._compute.timed(self._runner.run, inputs, segments))
        self._computing.add(computing)
        computing.add_done_callback(self._computing.discard)
        return computing

    def _computed(self, plan: StepPlan, planned: float, step: Timed[torch.Tensor]) -> None:
        """Hand a step's result on. `planned` is since when the stage had nothing else to do."""
        done = StepDone(
            epoch=self._epoch,
            step=plan.step,
            stage=self._stage,
            compute_seconds=step.end - step.begin,
            wait_seconds=step.begin - planned,
        )
        self.timeline.add(
            plan.epoch,
            plan.step,
            self._spans(plan),
            planned=planned,
            begin=step.begin,
            end=step.end,
        )
        if not self._last:
            self._tasks.spawn(self._hand_on(self._ring.send(step.result)), "hand-over")
        for item in plan.items:
            request = self._requests[item.key]
            self._push(request, item.start, item.start + item.length)
            if item.last:
                self._tasks.spawn(self._measure_exposed(request), "end of a prompt")
        self.stats.count(sum(item.length for item in plan.items), done)
        self._to_leader(done)

    def _spans(self, plan: StepPlan) -> tuple[SpanChunk, ...]:
        admits = [(item, self._requests[item.key].admit) for item in plan.items]
        return tuple(
            SpanChunk(item.key, item.start, item.length, f"{admit.receiver}#{admit.grant}")
            for item, admit in admits
        )

    async def _measure_exposed(self, request: _Request) -> None:
        started = time.perf_counter()
        if request.in_flight:
            await asyncio.wait(set(request.in_flight))
        self.stats.exposed_transfer_seconds += time.perf_counter() - started

    async def _hand_on(self, send: Coroutine[object, object, None]) -> None:
        try:
            await send
        except TransferError as error:
            self._to_leader(
                StageFault(epoch=self._epoch, stage=self._stage, key=-1, message=str(error))
            )
        except PipelineBroken:
            log.debug("epoch %d ended during a hand-over", self._epoch)

    def _release(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            request = self._requests.pop(key)
            self._tasks.spawn(self._release_when_quiet(key, request), "release")

    async def _release_when_quiet(self, key: int, request: _Request) -> None:
        epoch = self._epoch
        await asyncio.gather(*request.in_flight)
        self._kv.finish(request.admit)
        self._to_leader(Released(epoch=epoch, stage=self._stage, keys=(key,)))
