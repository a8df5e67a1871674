"""Why a prompt is cut as it is: the plan, its predicted timeline, and the optimum beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner
from penstock_runtime.scheduler.cost_model import Chunk
from penstock_runtime.simulator.group import ROOT, scheduler_for, unlike_tokens
from penstock_runtime.simulator.replay import replay
from penstock_wire.blocks import block_hashes
from penstock_wire.messages import pack_tokens

if TYPE_CHECKING:
    from array import array

    from penstock_runtime.engine.timeline import StepSpan
    from penstock_runtime.scheduler.chunk_planner import ChunkSettings
    from penstock_runtime.scheduler.cost_model import Cost
    from penstock_runtime.simulator.hardware import Hardware
    from penstock_runtime.simulator.replay import Replay


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is to be explained."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of each prompt, in the group's prefix cache; whole pages count."""
    prompts: int = 1
    """Sent at once, one behind the other."""
    page_size: int
    costs: tuple[Cost, ...]
    """What the scheduler believes, a stage."""
    chunks: ChunkSettings
    hardware: Hardware

    def __post_init__(self) -> None:
        if not 0 <= self.cached_tokens < self.prompt_tokens or self.prompts < 1:
            raise ValueError(
                f"a prompt of {self.prompt_tokens} tokens, {self.cached_tokens} of them cached, "
                f"{self.prompts} times: there is nothing to compute"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The simulated answer. Seconds."""

    spans: list[StepSpan]
    ready: list[float]
    """When the KV of each prompt was complete."""
    predicted: list[float]
    """By the slowest stage's cost model, a step."""
    makespan: float
    formula: float
    """Sum of the predicted times, and P - 1 times the largest: what identical stages take."""
    optimum: float
    """(√W + √((P - 1) c))², the least makespan of stages as slow as the slowest. c is the mean
    overhead of a chunk, reading its prefix (gamma) included; links count nothing."""
    best_count: float
    """√((P - 1) W / c): how many equal chunks that takes."""
    bubble: float
    """Share of the stages' time, from the first begin to the last end, in which they idle."""
    speedup: float
    """Over one worker that has all layers and computes the prompts in one step each."""

    @property
    def steps(self) -> list[StepSpan]:
        """The steps as stage 0 computed them."""
        return [span for span in self.spans if span.stage == 0]


def explain(question: Question) -> Explanation:
    """Simulate the prompts on an idle group, by the scheduler that would serve them."""
    page_size, count = question.page_size, question.prompts
    cached = question.cached_tokens // page_size * page_size
    pool = PagePool(count * pages_for(question.prompt_tokens, page_size), page_size)
    for number in range(count):
        _cache(pool, unlike_tokens(number, cached))
    replayed = replay(
        scheduler_for(question.costs, pool, question.chunks),
        question.hardware,
        [question.prompt_tokens] * count,
        page_size=page_size,
        record=True,
    )
    return _judge(question, replayed, cached)


def _cache(pool: PagePool, tokens: array[int]) -> None:
    """Put whole pages of tokens into the group's cache."""
    hashes = block_hashes(ROOT, pack_tokens(tokens), pool.page_size)
    pages = pool.allocate(len(hashes))
    for page, block, parent in zip(pages, hashes, [ROOT, *hashes], strict=False):
        pool.commit(page, block, parent)
    pool.release(pages)


def _judge(question: Question, replayed: Replay, cached: int) -> Explanation:
    stages = len(question.costs)
    spans = replayed.spans
    steps = [[Chunk(c.start, c.length) for c in s.chunks] for s in spans if s.stage == 0]
    slowest = max(
        question.costs, key=lambda cost: cost.chunk(cached, question.prompt_tokens - cached)
    )
    predicted = [slowest.step(chunks) for chunks in steps]
    work = question.prompts * slowest.work(cached, question.prompt_tokens)
    overhead = ChunkPlanner(stages, question.page_size, question.chunks).step_overhead(
        slowest, (cached + question.prompt_tokens) / 2
    )
    return Explanation(
        spans=spans,
        ready=replayed.ready,
        predicted=predicted,
        makespan=replayed.makespan,
        formula=sum(predicted) + (stages - 1) * max(predicted),
        optimum=(math.sqrt(work) + math.sqrt((stages - 1) * overhead)) ** 2,
        best_count=math.sqrt((stages - 1) * work / overhead) if overhead else math.inf,
        bubble=replayed.bubble,
        speedup=_one_worker(question, cached) / replayed.makespan,
    )


def _one_worker(question: Question, cached: int) -> float:
    """Return the seconds of one worker with all layers; it has the fixed cost of one stage."""
    chunk = [Chunk(cached, question.prompt_tokens - cached)]
    fixed = max(model.cost.c for model in question.hardware.stages)
    layers = sum(model.seconds(chunk) - model.cost.c for model in question.hardware.stages)
    return question.prompts * (fixed + layers)
