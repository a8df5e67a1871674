"""A prefill group without a model: the real scheduler and pool, stages that only keep books.

KV is simulated as in `decode_simulation`: every slot of a page holds, a stage, the hash of the
sequence up to its token. A stage checks all that it reads before it computes, and a receiver checks
all that it was sent. Stages run in their own time, and what they say arrives in order, some time.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk, Cost, CostModel
from penstock_runtime.scheduler.prefill import (
    PrefillRequest,
    PrefillScheduler,
    PrefillSettings,
)
from penstock_wire.messages import Admit, Released, StageFault, StepDone
from tests.unit.runtime.scheduler.decode_simulation import ROOT, prefix_hashes

if TYPE_CHECKING:
    from array import array

    from penstock_wire.messages import StepPlan

COST = Cost(c=1e-3, gamma=0.0, b=1e-3, a=1e-6)
RECEIVER = "d/1"


def request(
    grant: int,
    tokens: array[int],
    *,
    page_size: int = 4,
    cached: int = 0,
    receiver: str = RECEIVER,
    incarnation: int = 1,
) -> PrefillRequest:
    """A prompt for pages that nobody else uses."""
    pages = -(-len(tokens) // page_size)
    return PrefillRequest(
        grant=grant,
        receiver=receiver,
        incarnation=incarnation,
        tokens=tokens,
        cached=cached,
        target_pages=tuple(range(grant * 1000, grant * 1000 + pages)),
        root=ROOT,
    )


def scheduler_of(
    stages: int, pool: PagePool, settings: PrefillSettings | None = None, **chunks: object
) -> PrefillScheduler:
    options = ChunkSettings(**({"max_tokens": 32, "saturation_tokens": 0} | chunks))  # type: ignore[arg-type]
    planner = ChunkPlanner(stages, pool.page_size, options)
    costs = [CostModel(COST) for _ in range(stages)]
    return PrefillScheduler(stages, pool, planner, settings, costs)


def makespan(
    scheduler: PrefillScheduler, stages: int, cost: Cost
) -> tuple[dict[int, float], list[StepPlan]]:
    """Run all that waits on stages that take exactly `cost`.

    Returns when the last stage was done with each key, and the plans.
    """
    free = [0.0] * stages
    events: list[tuple[float, int, int, int, float]] = []
    finished: dict[int, float] = {}
    plans: list[StepPlan] = []
    now = 0.0
    while True:
        while (plan := scheduler.next_plan(now)) is not None:
            plans.append(plan)
            seconds = cost.step([Chunk(i.start, i.length) for i in plan.items])
            end = now
            for stage in range(stages):
                end = free[stage] = max(end, free[stage]) + seconds
                if plan.items:
                    heapq.heappush(events, (end, 0, plan.step, stage, seconds))
                for key in plan.release:
                    heapq.heappush(events, (end, 1, key, stage, 0.0))
            finished.update({item.key: end for item in plan.items if item.last})
        if not events:
            return finished, plans
        now, kind, number, stage, seconds = heapq.heappop(events)
        if kind:
            scheduler.released(0, stage, [number])
        else:
            scheduler.step_done(
                StepDone(
                    epoch=0, step=number, stage=stage, compute_seconds=seconds, wait_seconds=0.0
                )
            )


@dataclass
class Stage:
    index: int
    plans: deque[StepPlan] = field(default_factory=deque)
    admitted: dict[int, Admit] = field(default_factory=dict)
    loaded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    """(page, slot) → hash."""
    says: deque[StepDone | Released | StageFault] = field(default_factory=deque)


class GroupSimulation:
    """Random schedules of a whole group; every method that happens in time is one event."""

    def __init__(self, seed: int, stages: int, pool_pages: int, page_size: int) -> None:
        self.random = random.Random(seed)
        self.page_size = page_size
        self.pool = PagePool(pool_pages, page_size)
        self.scheduler = scheduler_of(stages, self.pool, max_tokens=8 * page_size)
        self.stages = [Stage(i) for i in range(stages)]
        self.epoch = 0
        self.now = 0.0
        self.planned = 0
        """Tokens in all plans."""
        self.prompts: dict[int, PrefillRequest] = {}
        self.received: dict[tuple[int, int, int], int] = {}
        """(target page, slot, stage) → hash."""
        self.sent: dict[tuple[int, int], int] = {}
        """(grant, stage) → tokens sent, from the first that were wanted."""
        self.ended: dict[int, str] = {}
        """Grants that failed or were revoked."""

    def add(self, new: PrefillRequest) -> None:
        self.prompts[new.grant] = new
        hashes = prefix_hashes(new.tokens)
        for stage in self.stages:
            for position in range(new.cached):
                page = new.target_pages[position // self.page_size]
                self.received[page, position % self.page_size, stage.index] = hashes[position]
        self.scheduler.add(new, self.now)

    def plan(self) -> None:
        plan = self.scheduler.next_plan(self.now, may_compute=self.random.random() < 0.8)
        if plan is None:
            return
        assert plan.epoch == self.epoch
        self.planned += sum(item.length for item in plan.items)
        for stage in self.stages:
            stage.plans.append(plan)

    def carry_out(self, stage: Stage, fault_rate: float) -> None:
        """A stage carries out its next plan."""
        if not stage.plans:
            return
        plan = stage.plans.popleft()
        for admit in plan.admit:
            stage.admitted[admit.key] = admit
            self._send(stage, admit, admit.send_from * self.page_size, admit.start)
        for item in plan.items:
            admit = stage.admitted[item.key]
            if admit.load[1] > admit.load[0] and item.key not in stage.loaded:
                stage.loaded.add(item.key)
                self._load(stage, admit, broken=self.random.random() < fault_rate)
            self._compute(stage, admit, item.start, item.start + item.length)
        if plan.items:
            stage.says.append(
                StepDone(
                    epoch=self.epoch,
                    step=plan.step,
                    stage=stage.index,
                    compute_seconds=0.01,
                    wait_seconds=0.0,
                )
            )
        for key in plan.release:
            del stage.admitted[key]
            stage.says.append(Released(epoch=self.epoch, stage=stage.index, keys=(key,)))

    def _load(self, stage: Stage, admit: Admit, *, broken: bool) -> None:
        for position in range(admit.load[0] * self.page_size, admit.load[1] * self.page_size):
            index, slot = divmod(position, self.page_size)
            value = self.received[admit.target_pages[index], slot, stage.index]
            stage.kv[admit.pages[index], slot] = -1 if broken else value
        if broken:
            self._fail(stage, admit.key)

    def _fail(self, stage: Stage, key: int) -> None:
        stage.failed.add(key)
        fault = StageFault(epoch=self.epoch, stage=stage.index, key=key, message="load failed")
        stage.says.append(fault)

    def _compute(self, stage: Stage, admit: Admit, start: int, end: int) -> None:
        prompt = self.prompts[admit.grant]
        hashes = prefix_hashes(prompt.tokens)
        sound = not any(admit.key in s.failed for s in self.stages[: stage.index + 1])
        for position in range(start):
            page, slot = admit.pages[position // self.page_size], position % self.page_size
            assert not sound or stage.kv.get((page, slot)) == hashes[position]
        for position in range(start, end):
            page, slot = admit.pages[position // self.page_size], position % self.page_size
            stage.kv[page, slot] = hashes[position] if sound else -2
        self._send(stage, admit, start, end)

    def _send(self, stage: Stage, admit: Admit, start: int, end: int) -> None:
        start = max(start, admit.send_from * self.page_size)
        for position in range(start, end):
            index, slot = divmod(position, self.page_size)
            value = stage.kv[admit.pages[index], slot]
            self.received[admit.target_pages[index], slot, stage.index] = value
        if end > start:
            key = (admit.grant, stage.index)
            assert self.sent.get(key, admit.send_from * self.page_size) == start
            self.sent[key] = end

    def hear(self, stage: Stage) -> None:
        """Stage 0's scheduler gets the next message of a stage."""
        if not stage.says:
            return
        message = stage.says.popleft()
        if isinstance(message, StepDone):
            self.scheduler.step_done(message)
        elif isinstance(message, Released):
            self.scheduler.released(message.epoch, message.stage, message.keys)
        else:
            failed = self.scheduler.fault(message.epoch, message.key, message.message)
            if failed is not None:
                assert failed.grant not in self.ended
                self.ended[failed.grant] = "failed"

    def revoke(self, grant: int) -> None:
        if self.scheduler.revoke(RECEIVER, grant):
            assert grant not in self.ended
            self.ended[grant] = "revoked"

    def new_epoch(self, *, replaced: bool) -> None:
        """A stage was lost: maybe with its memory, in any case with all that was on its way."""
        self.epoch += 1
        pool = None
        if replaced:
            victim = self.random.choice(self.stages)
            victim.kv.clear()
            pool = self.pool = PagePool(self.pool.total, self.page_size)
        for stage in self.stages:
            stage.plans.clear()
            stage.admitted.clear()
            stage.loaded.clear()
            stage.failed.clear()
            stage.says.clear()
        for failed in self.scheduler.new_epoch(self.epoch, "stage lost", pool):
            assert failed.grant not in self.ended
            self.ended[failed.grant] = "failed"

    def turn(self, fault_rate: float) -> None:
        self.now += 1.0
        self.plan()
        for stage in self.random.sample(self.stages, len(self.stages)):
            if self.random.random() < 0.7:
                self.carry_out(stage, fault_rate)
            while stage.says and self.random.random() < 0.6:
                self.hear(stage)
        self.pool.check()
        self._check_load()

    def _check_load(self) -> None:
        """What is kept as sums must be what a count finds."""
        scheduler = self.scheduler
        left = [(a.planned, a.end) for a in scheduler._active.values()]
        left += [(w.request.cached, len(w.request.tokens)) for w in scheduler._waiting]
        load = scheduler.load()
        assert load.queued_tokens == sum(end - start for start, end in left)
        cost = scheduler._costs[scheduler._slowest()].cost
        work = sum(cost.work(start, end) for start, end in left)
        assert abs(load.queued_seconds - work) <= 1e-9 * (1 + work)
        given = sum(1 for step in scheduler._steps.values() if 0 in step.stages)
        assert scheduler._given == given

    def run(self, fault_rate: float = 0.0, limit: int = 3000) -> None:
        """Go on until nothing is left, and check what the receivers have."""
        while not self.scheduler.idle:
            self.turn(fault_rate)
            limit -= 1
            assert limit, "no end in sight"
        self.check_received()
        counts = self.pool.counts()
        assert counts.resident == 0

    def check_received(self) -> None:
        for grant, prompt in self.prompts.items():
            if grant in self.ended:
                continue
            hashes = prefix_hashes(prompt.tokens)
            for position, expected in enumerate(hashes):
                page = prompt.target_pages[position // self.page_size]
                for stage in self.stages:
                    value = self.received.get((page, position % self.page_size, stage.index))
                    assert value == expected, (grant, position, stage.index)
