"""Where to cut a prompt into chunks, so that a pipeline of P stages is done with it soonest.

With identical stages, chunks of times t_1 … t_M take sum(t) + (P - 1) max(t). Cutting saves nothing
of the work W itself, so sum(t) = W + M c, and for a given M equal times are best:

    makespan(M) = (W + M c) (1 + (P - 1) / M),  least at M* = sqrt((P - 1) W / c),
    where it is (sqrt(W) + sqrt((P - 1) c))².

Prompts that queue behind fill the bubble (P - 1) max(t) for each other. With Q seconds of such work
one bubble is paid for all of W + Q, and the best time of a chunk, W / M, becomes
sqrt((W + Q) c / (P - 1)): the longer the queue, the fewer and larger the chunks. The queue makes
them no larger than those of which c is a share `overhead`: from there on little is to be gained.

Where the m = P - 1 stages behind the first are faster, the bubble is the last chunk's time, not the
longest one's, as long as no chunk has to wait for the one before it. So each may take a share
`taper` less (see there): with R seconds of work left t = t_last + taper R. From a work of W that
makes ln(1 + taper W / t_last) / taper chunks, and with t_last seconds of bubble a stage

    c ln(1 + taper W / t_last) / taper + m t_last  is least at
    t_last = sqrt((taper W / 2)² + W c / m) - taper W / 2,

which is the time of equal chunks where taper is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from penstock_runtime.scheduler.cost_model import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.scheduler.cost_model import Cost

_ALIKE = 0.01
"""What stages' times may differ by because they were measured."""


def taper(seconds: Sequence[float]) -> float:
    """Return by what share a chunk may take less time than the one before without waiting for it.

    With stages that take e or less of the first one's time t, the i-th behind it has chunk k at
    T_k + (i - 1) e t_k, where T_k is the sum of the first one's times, and is done with the one
    before i e t_(k-1) behind T_(k-1). So t_k (1 + (i - 1) e) must be i e t_(k-1): the last stage,
    i = m, allows least. e is taken for a little more than it was measured to be.

    Args:
        seconds: of one chunk on every stage. If the first is not the slowest, it is 0: in front of
            the slowest one chunks would have to become longer in the same way.
    """
    behind = len(seconds) - 1
    if behind < 1 or seconds[0] <= 0:
        return 0.0
    slowest = max(seconds[1:]) / seconds[0] + _ALIKE
    return max(0.0, 1 - slowest) / (1 + (behind - 1) * slowest)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSettings:
    """How prompts are cut."""

    mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: by the cost model. fixed: `fixed_tokens` a step, whatever it costs."""
    fixed_tokens: int = 4096
    max_tokens: int = 8192
    """Most tokens of a step: the memory for its activations, and a ring slot, are this large."""
    saturation_tokens: int = 64
    """Smaller steps would leave the linear layers' matrix units idle, which the cost model does
    not know: a tile of rows on a CPU, a few hundred on a GPU. It also bounds the steps from below
    while c is so small beside the noise that it is taken for 0."""
    overhead: float = 0.02
    """The share of c in a chunk's time below which larger chunks are not worth their latency."""
    max_seconds: float = 2.0
    """Longest step: until it ends a short prompt that comes in has to wait."""

    def __post_init__(self) -> None:
        if self.fixed_tokens < 1 or self.max_tokens < 1:
            raise ValueError("a step has room for at least one token")
        if not 0 < self.overhead < 1 or self.max_seconds <= 0 or self.saturation_tokens < 0:
            raise ValueError(f"impossible chunk settings: {self}")


class ChunkPlanner:
    """Cuts prompts for one pipeline. Pure.

    Args:
        stages: P.
        page_size: boundaries between chunks are multiples of it, in tokens.
        settings: limits; `max_tokens` is at least one page.
    """

    def __init__(self, stages: int, page_size: int, settings: ChunkSettings | None = None) -> None:
        self.stages = stages
        self.page_size = page_size
        self.settings = settings or ChunkSettings()
        if stages < 1 or page_size < 1 or self.settings.max_tokens < page_size:
            raise ValueError(
                f"{stages} stages, pages of {page_size} and at most {self.settings.max_tokens} "
                "tokens a step: a step holds at least one page"
            )

    @property
    def step_tokens(self) -> int:
        """Most tokens of one step: whole pages."""
        settings = self.settings
        limit = settings.max_tokens
        if settings.mode == "fixed":
            limit = min(limit, settings.fixed_tokens)
        return max(self.page_size, limit // self.page_size * self.page_size)

    def chunk_work(
        self,
        cost: Cost,
        work: float,
        context: float,
        *,
        queued: float = 0.0,
        left: float = 0.0,
        taper: float = 0.0,
    ) -> float:
        """Return the best work of one step, in seconds besides its overhead.

        Args:
            cost: of the slowest stage.
            work: W, of the longest prompt that is computed now, with what is done of it.
            context: mean position of a chunk's start, for what reading the prefix costs.
            queued: Q, what goes through the pipeline beside and behind it without a pause.
            left: R, what is left of both; not needed where `taper` is 0.
            taper: what the function of this name returns for the stages.
        """
        settings, overhead = self.settings, self.step_overhead(cost, context)
        best = overhead / settings.overhead
        if self.stages > 1:
            # Work that waits does not make chunks larger than that, and long prompts do.
            limit = max(best, self._best(work, overhead, min(left, work), taper))
            best = min(limit, self._best(work + queued, overhead, left, taper))
        least = cost.work(context, context + settings.saturation_tokens)
        return max(min(best, settings.max_seconds), least, 1e-9)

    def _best(self, work: float, overhead: float, left: float, taper: float) -> float:
        half = taper * work / 2
        last = math.sqrt(half * half + work * overhead / (self.stages - 1)) - half
        return last + taper * left

    def step_overhead(self, cost: Cost, context: float) -> float:
        """Return what each further chunk costs: c and another reading of the prefix."""
        return cost.c + cost.gamma * context

    def plan(self, cost: Cost, start: int, end: int, queued_tokens: int = 0) -> list[Chunk]:
        """Cut tokens [start, end) of one prompt into chunks of equal time, long ones first.

        Args:
            cost: of the slowest stage.
            start: first token that is computed, behind a cached prefix of whole pages.
            end: length of the prompt.
            queued_tokens: of prompts that wait behind this one.
        """
        if end <= start:
            return []
        if self.settings.mode == "fixed":
            return self._cut(start, end, [])
        work = cost.work(start, end)
        queued = cost.work(0, queued_tokens) if queued_tokens else 0.0
        context = (start + end) / 2
        ideal = work / self.chunk_work(cost, work, context, queued=queued)
        count = max(1, math.floor(ideal), -(-(end - start) // self.step_tokens))
        few, many = (self.equal_times(cost, start, end, m) for m in (count, count + 1))
        return min(few, many, key=lambda chunks: self.makespan(cost, chunks, queued))

    def equal_times(self, cost: Cost, start: int, end: int, count: int) -> list[Chunk]:
        """Cut [start, end) into `count` chunks of one time, as far as pages and memory allow.

        Memory can make it more chunks, and pages fewer.
        """
        share = cost.work(start, end) / count
        if cost.gamma == 0 and cost.tokens_within(start, share) <= self.step_tokens:
            marks = [start + cost.tokens_within(start, i * share) for i in range(1, count)]
        else:
            marks = self._marks_by_bisection(cost, start, end, count)
        return self._cut(start, end, marks)

    def makespan(self, cost: Cost, chunks: list[Chunk], queued: float = 0.0) -> float:
        """Return when the last stage is done with `chunks` and `queued` seconds of other work.

        The other work is taken to be cut like these chunks.
        """
        times = [cost.chunk(*chunk) for chunk in chunks]
        total = sum(times)
        work = sum(cost.work(s, s + n) for s, n in chunks)
        stretched = queued * total / work if work else queued
        return total + stretched + (self.stages - 1) * max(times, default=0.0)

    def _marks_by_bisection(self, cost: Cost, start: int, end: int, count: int) -> list[float]:
        """Return inner boundaries of chunks whose times include reading their prefix."""
        low, high = 0.0, cost.work(start, end) + cost.gamma * end
        for _ in range(60):
            middle = (low + high) / 2
            if self._walk(cost, start, middle, count)[-1] < end:
                low = middle
            else:
                high = middle
        return self._walk(cost, start, high, count)[:-1]

    def _walk(self, cost: Cost, start: int, seconds: float, count: int) -> list[float]:
        """Return where each of `count` chunks that take `seconds` besides c would end."""
        marks: list[float] = []
        position = float(start)
        for _ in range(count):
            # Not a whole number of tokens: only the final boundaries are rounded.
            length = cost.tokens_within(position, seconds)
            position += min(float(self.step_tokens), length)
            marks.append(position)
        return marks

    def _cut(self, start: int, end: int, marks: list[float]) -> list[Chunk]:
        """Cut at the pages nearest to `marks`, and wherever a step would be too large."""
        chunks: list[Chunk] = []
        position = start
        for mark in [*marks, float(end)]:
            # The nearest page may end behind the prompt, and infinity has none.
            target = end if mark >= end else round(mark / self.page_size) * self.page_size
            target = min(target, end)
            while position < target:
                stop = min(target, self.after(position))
                chunks.append(Chunk(position, stop - position))
                position = stop
        return chunks

    def after(self, position: int) -> int:
        """Return the last page boundary that a step from `position` can reach."""
        return (position + self.step_tokens) // self.page_size * self.page_size
