"""What a plan does to the stages and links of a pipeline, and when.

Every resource here is first come, first served, in the order of the plans: a stage carries out its
plans in order, a link carries what it is given. So nothing that is decided later can change when
something earlier ends, and the times of a whole plan follow at once from the plans before it:

    begin(s, n) = max(end(s, n - 1), plan n is at s, activations of n are at s, pages are loaded)
    end(s, n)   = begin + the stage's time of n's chunks
    activations leave s for s + 1 when they are computed, the link is free, and stage s + 1 has
    taken in what was in the ring's slot before

as `engine.stage` and `engine.ring` do it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from penstock_runtime.engine.timeline import SpanChunk, StepSpan
from penstock_runtime.scheduler.cost_model import Chunk

if TYPE_CHECKING:
    from penstock_runtime.simulator.hardware import Hardware
    from penstock_wire.messages import Admit, ChunkItem, StepPlan


class Outcome(NamedTuple):
    """When what a plan asked for is done, in seconds."""

    steps: list[tuple[float, float, float]]
    """A stage: (planned, begin, end) of its step; empty if nothing is computed."""
    ready: list[tuple[float, int]]
    """When the KV of a prompt that ends in this plan has arrived as a whole, and its key."""
    released: list[tuple[float, int, int]]
    """When a stage touches a request's pages no more, the stage, and the key."""


class _Request:
    """What a stage has in flight for a request."""

    def __init__(self, admit: Admit, stages: int) -> None:
        self.admit = admit
        self.loaded = [0.0] * stages
        self.sent = [0.0] * stages


class Pipeline:
    """Stages and links.

    Args:
        hardware: how long things take.
        page_size: tokens a page.
        seed: of the noise.
    """

    def __init__(self, hardware: Hardware, page_size: int, seed: int = 0) -> None:
        stages = len(hardware.stages)
        self._hardware = hardware
        self._page_size = page_size
        self._random = random.Random(seed)  # noqa: S311 - noise of a simulation
        self._free = [0.0] * stages
        self._link_free = [0.0] * stages
        self._kv_free = [0.0] * stages
        self._taken: list[deque[float]] = [
            deque(maxlen=hardware.ring_slots) for _ in hardware.stages
        ]
        """When each stage took in its last hand-overs."""
        self._requests: dict[int, _Request] = {}
        self.busy = [0.0] * stages
        """Seconds computed, a stage."""

    def carry_out(self, plan: StepPlan, now: float) -> Outcome:
        """Carry out the next plan, made at `now`."""
        stages = range(len(self._free))
        planned = [
            max(self._free[s], now + (self._hardware.control_latency if s else 0.0)) for s in stages
        ]
        ready: list[tuple[float, int]] = []
        for admit in plan.admit:
            self._admit(admit, planned)
            if admit.start >= admit.length:
                ready.append((max(planned[-1], *self._requests[admit.key].sent), admit.key))
        steps = self._compute(plan, planned) if plan.items else []
        for item in plan.items:
            if item.last:
                arrived = max(*self._requests[item.key].sent, steps[-1][2])
                ready.append((arrived, item.key))
        released: list[tuple[float, int, int]] = []
        for key in plan.release:
            request = self._requests.pop(key)
            for s in stages:
                quiet = max(planned[s], self._free[s], request.sent[s], request.loaded[s])
                released.append((quiet + (self._hardware.control_latency if s else 0.0), s, key))
        return Outcome(steps, ready, released)

    def _admit(self, admit: Admit, planned: list[float]) -> None:
        request = _Request(admit, len(planned))
        self._requests[admit.key] = request
        first, last = admit.load
        for s, time in enumerate(planned):
            if last > first:
                request.loaded[s] = self._move_kv(s, time, (last - first) * self._page_size)
            cached = admit.start // self._page_size - admit.send_from
            if cached > 0:
                request.sent[s] = self._move_kv(s, time, cached * self._page_size)

    def _compute(self, plan: StepPlan, planned: list[float]) -> list[tuple[float, float, float]]:
        chunks = [Chunk(item.start, item.length) for item in plan.items]
        size = self._hardware.activation_bytes * sum(chunk.length for chunk in chunks)
        steps: list[tuple[float, float, float]] = []
        arrived = 0.0
        for s, model in enumerate(self._hardware.stages):
            begin = max(planned[s], arrived)
            if s:
                self._taken[s].append(begin)
            loaded = max(self._requests[item.key].loaded[s] for item in plan.items)
            begin = max(begin, loaded)
            end = begin + model.seconds(chunks) * self._noise()
            self._free[s] = end
            self.busy[s] += end - begin
            steps.append((planned[s], begin, end))
            for item in plan.items:
                self._push(s, item, end)
            if s + 1 < len(planned):
                arrived = self._hand_over(s, end, size)
        return steps

    def _hand_over(self, s: int, computed: float, size: float) -> float:
        """Return when activations of `size` bytes are at stage s + 1."""
        link = self._hardware.activations
        taken = self._taken[s + 1]
        # The slot was used `ring_slots` hand-overs ago; its credit travels back.
        slot_free = taken[0] + link.latency if len(taken) == taken.maxlen else 0.0
        start = max(computed, self._link_free[s], slot_free)
        self._link_free[s] = start + link.seconds(size)
        return self._link_free[s] + link.latency

    def _push(self, s: int, item: ChunkItem, computed: float) -> None:
        request = self._requests[item.key]
        start = max(item.start, request.admit.send_from * self._page_size)
        tokens = item.start + item.length - start
        if tokens > 0:
            request.sent[s] = max(request.sent[s], self._move_kv(s, computed, tokens))

    def _move_kv(self, s: int, earliest: float, tokens: int) -> float:
        """Return when the KV of `tokens` tokens has moved between stage s and a decode worker."""
        link = self._hardware.kv
        start = max(earliest, self._kv_free[s])
        self._kv_free[s] = start + link.seconds(tokens * self._hardware.kv_bytes)
        return self._kv_free[s] + link.latency

    def _noise(self) -> float:
        sigma = self._hardware.noise
        return math.exp(self._random.gauss(0.0, sigma)) if sigma else 1.0


def spans(plan: StepPlan, outcome: Outcome) -> list[StepSpan]:
    """Return the bars of a plan's step, one a stage."""
    chunks = tuple(SpanChunk(item.key, item.start, item.length) for item in plan.items)
    return [
        StepSpan(s, plan.step, begin, end, begin - planned, chunks, plan.epoch)
        for s, (planned, begin, end) in enumerate(outcome.steps)
    ]
