"""How the published system cuts prompts and fills its pipeline: for comparison, never for serving.

Its event loop has as many micro-batches as stages: a stage takes in the next result of the last
stage before it starts another, so a chunk starts only when the one P before it has left the
pipeline. Chunks of unequal times then wait for each other, also those of different prompts.
Prompts are taken in order, and a chunk holds tokens of one prompt (its throughput test says batch
size 1).
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

from penstock_wire.messages import Admit, ChunkItem, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from penstock_runtime.scheduler.cost_model import Cost
    from penstock_runtime.scheduler.prefill import PrefillRequest
    from penstock_wire.messages import StepDone


class Rule(Protocol):
    """How long the next chunk of a prompt is."""

    def tokens(self, computed: int) -> int:
        """Return the length, in tokens, of the chunk behind `computed` ones."""
        ...


class FixedRule:
    """Chunks of one size."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk

    def tokens(self, computed: int) -> int:  # noqa: ARG002
        """Return that size."""
        return self._chunk


class DynamicRule:
    """Chunks that are to take as long as the first one, approached by a smoothing factor.

    T(L) = linear L + quadratic L² is fitted at start-up to prompts without a prefix; the next chunk
    x solves T(L + x) - T(L) = T(first). The first is always of full size, none is smaller than a
    quarter of it, and lengths are rounded down to 64 tokens or pages.

    Args:
        first: tokens of the first chunk.
        smoothing: how far to go from `first` to the solution: 0 not at all, 1 all the way.
        cost: of a stage; its b and a are taken to be what a perfect fit finds.
        align: tokens.
    """

    def __init__(self, first: int, smoothing: float, cost: Cost, align: int = 64) -> None:
        self._first = first
        self._smoothing = smoothing
        self._linear, self._quadratic = cost.b, cost.a
        self._align = align
        self._target = cost.b * first + cost.a * first * first

    def tokens(self, computed: int) -> int:
        """Return the length of the next chunk."""
        if computed == 0:
            return self._first
        slope = self._linear + 2 * self._quadratic * computed
        root = math.sqrt(slope * slope + 4 * self._quadratic * self._target)
        solution = 2 * self._target / (slope + root)
        smooth = self._first + self._smoothing * (solution - self._first)
        length = max(int(smooth), self._first // 4)
        return max(self._align, length // self._align * self._align)


class LockStepScheduler:
    """At most `in_flight` steps in the pipeline, prompts in order. A `group.Scheduler`."""

    def __init__(self, stages: int, rule: Rule, in_flight: int | None = None) -> None:
        self._last_stage = stages - 1
        self._rule = rule
        self._in_flight = in_flight or stages
        self._waiting: deque[tuple[int, PrefillRequest]] = deque()
        self._computed = 0
        """Tokens of the first waiting prompt that are in plans."""
        self._running = 0
        self._next_key = 0
        self._next_step = 0
        self._stages_left: dict[int, int] = {}

    def add(self, request: PrefillRequest, now: float) -> None:  # noqa: ARG002
        """Queue a request."""
        self._waiting.append((self._next_key, request))
        self._next_key += 1

    def next_plan(self, now: float) -> StepPlan | None:  # noqa: ARG002
        """Return the next chunk if the pipeline has room for it."""
        if not self._waiting or self._running >= self._in_flight:
            return None
        key, request = self._waiting[0]
        start, total = self._computed, len(request.tokens)
        length = min(self._rule.tokens(start), total - start)
        last = start + length == total
        admit = (_admit(key, request),) if start == 0 else ()
        self._computed = 0 if last else start + length
        self._running += 1
        if last:
            self._waiting.popleft()
            self._stages_left[key] = self._last_stage + 1
        plan = StepPlan(
            step=self._next_step,
            epoch=0,
            items=(ChunkItem(key, start, length, last),),
            admit=admit,
            release=(key,) if last else (),
        )
        self._next_step += 1
        return plan

    def step_done(self, done: StepDone) -> None:
        """The last stage's result makes room for another step."""
        if done.stage == self._last_stage:
            self._running -= 1

    def released(self, epoch: int, stage: int, keys: Iterable[int]) -> None:  # noqa: ARG002
        """Count the stages that are through with a request."""
        for key in keys:
            self._stages_left[key] -= 1
            if not self._stages_left[key]:
                del self._stages_left[key]

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self._waiting or self._running or self._stages_left)


def _admit(key: int, request: PrefillRequest) -> Admit:
    return Admit(
        key=key,
        grant=request.grant,
        receiver=request.receiver,
        incarnation=request.incarnation,
        pages=(),
        target_pages=(),
        length=len(request.tokens),
    )


def lengths(rule: Rule, prompt: int) -> list[tuple[int, int]]:
    """Return the (start, length) of a prompt's chunks."""
    chunks: list[tuple[int, int]] = []
    start = 0
    while start < prompt:
        length = min(rule.tokens(start), prompt - start)
        chunks.append((start, length))
        start += length
    return chunks


def lock_step_makespan(times: Sequence[float], stages: int, in_flight: int) -> float:
    """Return when identical stages are done with steps of these times, `in_flight` at once.

    The recursion that `LockStepScheduler` on a `Pipeline` without links follows event by event;
    a fit needs it thousands of times.
    """
    free = [0.0] * stages
    left: deque[float] = deque(maxlen=in_flight)
    for seconds in times:
        end = max(free[0], left[0] if len(left) == in_flight else 0.0)
        for stage in range(stages):
            end = free[stage] = max(end, free[stage]) + seconds
        left.append(end)
    return free[-1]
