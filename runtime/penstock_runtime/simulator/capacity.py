"""How many prefill groups and decode workers a load needs.

Prefill is simulated with the real scheduler and real prefix caches; a request goes to the group
that would have it computed first: what is queued there, and what of it is not in its cache.
Decode is the model of `decode`; a request goes to the worker with the fewest tokens.

The time to the first token is prefill (waiting, computing, KV transfer) and the wait for the first
decode step, which gives the token. The router and the network to the client are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.simulator.clock import Clock
from penstock_runtime.simulator.decode import DecodeModel, DecodeWorker, Sequence, TokenGaps
from penstock_runtime.simulator.group import ROOT, PrefillGroup, request, scheduler_for
from penstock_wire.blocks import block_hashes
from penstock_wire.messages import pack_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.scheduler.chunk_planner import ChunkSettings
    from penstock_runtime.scheduler.cost_model import Cost
    from penstock_runtime.scheduler.prefill import PrefillRequest, PrefillScheduler
    from penstock_runtime.simulator.hardware import Hardware
    from penstock_runtime.simulator.workload import Arrival


class NoCapacity(Exception):  # noqa: N818 - it names the event
    """The targets are not met by any number that was tried. The message says which, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupModel:
    """One prefill group."""

    costs: tuple[Cost, ...]
    chunks: ChunkSettings
    hardware: Hardware
    page_size: int
    kv_tokens: int
    """That the smallest stage's memory holds, cached prefixes included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What is promised, in seconds, to `percent` of requests (TTFT) and of tokens (ITL)."""

    ttft: float
    itl: float
    percent: float = 99.0

    def __post_init__(self) -> None:
        if min(self.ttft, self.itl) <= 0 or not 0 < self.percent <= 100:
            raise ValueError(f"targets are above zero, and percentiles up to 100: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillOutcome:
    """Simulated, of a number of groups."""

    groups: int
    ready: list[float]
    """When each request's KV was with its decode worker."""
    cached_tokens: int
    """Prompt tokens found in a group's prefix cache."""
    utilisation: float
    """Of the busiest group's busiest stage, until the last request was ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOutcome:
    """Simulated, of a number of decode workers behind a prefill outcome. Seconds."""

    workers: int
    ttft: list[float]
    """Of each request."""
    gaps: TokenGaps
    utilisation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One pair of numbers and what it would give. Seconds."""

    groups: int
    workers: int
    ttft_p50: float
    ttft: float
    """At the targets' percentile."""
    itl_p50: float
    itl: float
    prefill_utilisation: float
    decode_utilisation: float
    cached_share: float
    """Of the prompt tokens."""
    meets: bool


def simulate_prefill(arrivals: list[Arrival], model: GroupModel, groups: int) -> PrefillOutcome:
    """Send a load through `groups` prefill groups."""
    clock = Clock()
    ready = [0.0] * len(arrivals)

    def on_ready(done: PrefillRequest, time: float) -> None:
        ready[done.grant] = time

    routed = [_RoutedGroup(clock, model, on_ready, seed) for seed in range(groups)]

    def arrive(number: int) -> None:
        tokens = arrivals[number].tokens(number)
        hashes = block_hashes(ROOT, pack_tokens(tokens), model.page_size)
        best = min(routed, key=lambda group: group.seconds_until_computed(hashes, len(tokens)))
        best.take(request(number, tokens, model.page_size), hashes)
        if number + 1 < len(arrivals):
            clock.at(arrivals[number + 1].time, arrive, number + 1)

    clock.at(arrivals[0].time, arrive, 0)
    clock.run()
    for group in routed:
        group.group.check_idle()
    busiest = max(max(group.group.busy_seconds) for group in routed)
    return PrefillOutcome(
        groups=groups,
        ready=ready,
        cached_tokens=sum(group.cached_tokens for group in routed),
        utilisation=busiest / max(ready),
    )


class _RoutedGroup:
    """A group and what a router knows of it."""

    def __init__(
        self,
        clock: Clock,
        model: GroupModel,
        on_ready: Callable[[PrefillRequest, float], None],
        seed: int,
    ) -> None:
        self._model = model
        self._slowest = max(model.costs, key=lambda cost: cost.chunk(0, model.chunks.max_tokens))
        self._pool = PagePool(model.kv_tokens // model.page_size, model.page_size)
        self._scheduler: PrefillScheduler = scheduler_for(model.costs, self._pool, model.chunks)
        self.cached_tokens = 0
        self.group = PrefillGroup(
            clock,
            self._scheduler,
            model.hardware,
            page_size=model.page_size,
            on_ready=on_ready,
            record=False,
            seed=seed,
        )

    def seconds_until_computed(self, hashes: list[bytes], length: int) -> float:
        """Predict, as a router can: the queue, and what is not cached here."""
        cached = len(self._pool.match(hashes)) * self._model.page_size
        return self._scheduler.load().queued_seconds + self._slowest.work(cached, length)

    def take(self, new: PrefillRequest, hashes: list[bytes]) -> None:
        self.cached_tokens += len(self._pool.match(hashes)) * self._model.page_size
        self.group.add(new)


def simulate_decode(
    arrivals: list[Arrival], prefill: PrefillOutcome, model: DecodeModel, workers: int
) -> DecodeOutcome:
    """Send what was prefilled through `workers` decode workers."""
    pool = [DecodeWorker(model) for _ in range(workers)]
    order = sorted(range(len(arrivals)), key=lambda number: prefill.ready[number])
    for number in order:
        time = prefill.ready[number]
        for worker in pool:
            worker.advance(time)
        best = min(pool, key=lambda worker: worker.load)
        arrival = arrivals[number]
        best.add(Sequence(time, number, arrival.input_tokens, arrival.output_tokens))
    gaps = TokenGaps()
    ttft = [0.0] * len(arrivals)
    for worker in pool:
        worker.advance()
        gaps.merge(worker.gaps)
        for number, time in worker.first_tokens.items():
            ttft[number] = time - arrivals[number].time
    return DecodeOutcome(
        workers=workers,
        ttft=ttft,
        gaps=gaps,
        utilisation=max(w.busy_seconds for w in pool) / max(w.end for w in pool),
    )


def percentile(values: list[float], percent: float) -> float:
    """Return the least of the values that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def plan_capacity(
    arrivals: list[Arrival],
    group: GroupModel,
    decode: DecodeModel,
    targets: Targets,
    *,
    most: int = 64,
) -> list[Candidate]:
    """Search the fewest groups and, with them, the fewest decode workers that meet the targets.

    First the fewest groups whose prefill alone keeps the TTFT, then the fewest decode workers
    behind them that keep both; if none do, with one more group. More of either is taken to be never
    worse, so numbers are doubled and then halved between.

    Returns:
        All pairs that were simulated; the last one meets the targets.

    Raises:
        NoCapacity: no pair up to `most` of each does.
    """
    _check_fits(arrivals, group, decode)
    search = _Search(arrivals, group, decode, targets)
    groups = _least(search.prefill_keeps_ttft, 1, most)
    while groups is not None and groups <= most:
        fixed = groups
        workers = _least(lambda n: search.both_keep(fixed, n), 1, most)  # noqa: B023 - used at once
        if workers is not None:
            return search.ending_with(fixed, workers)
        groups += 1
    raise NoCapacity(
        f"up to {most} prefill groups and {most} decode workers do not give {targets.percent:g} % "
        f"of the requests a first token in {targets.ttft:g} s and of the tokens a gap of at most "
        f"{targets.itl:g} s. Alone, the longest prompt takes {_lone_seconds(arrivals, group):.3g} "
        f"s and a decode step {decode.seconds(1, 0):.3g} s: loosen the targets, or take faster "
        "stages"
    )


def _least(meets: Callable[[int], bool], first: int, most: int) -> int | None:
    """Return the least number from `first` to `most` that meets, if any does."""
    low, high = first - 1, first
    while not meets(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


class _Search:
    """What has been simulated so far."""

    def __init__(
        self, arrivals: list[Arrival], group: GroupModel, decode: DecodeModel, targets: Targets
    ) -> None:
        self._arrivals = arrivals
        self._group = group
        self._decode = decode
        self._targets = targets
        self._prefill: dict[int, PrefillOutcome] = {}
        self._candidates: dict[tuple[int, int], Candidate] = {}

    def _prefilled(self, groups: int) -> PrefillOutcome:
        if groups not in self._prefill:
            self._prefill[groups] = simulate_prefill(self._arrivals, self._group, groups)
        return self._prefill[groups]

    def prefill_keeps_ttft(self, groups: int) -> bool:
        """Tell whether decode workers that let nobody wait would be in time."""
        prefill = self._prefilled(groups)
        waits = [r - a.time for r, a in zip(prefill.ready, self._arrivals, strict=True)]
        first = percentile(waits, self._targets.percent) + self._decode.seconds(1, 0)
        if first <= self._targets.ttft:
            return True
        candidate = _without_decode(self._arrivals, prefill, waits, self._targets)
        self._candidates[groups, 0] = candidate
        return False

    def both_keep(self, groups: int, workers: int) -> bool:
        """Tell whether this pair meets the targets."""
        prefill = self._prefilled(groups)
        outcome = simulate_decode(self._arrivals, prefill, self._decode, workers)
        candidate = _judge(self._arrivals, prefill, outcome, self._targets)
        self._candidates[groups, workers] = candidate
        return candidate.meets

    def ending_with(self, groups: int, workers: int) -> list[Candidate]:
        """Return what was tried, this pair last."""
        best = self._candidates.pop((groups, workers))
        return [*(self._candidates[pair] for pair in sorted(self._candidates)), best]


def _check_fits(arrivals: list[Arrival], group: GroupModel, decode: DecodeModel) -> None:
    longest = max(a.input_tokens for a in arrivals)
    pages = pages_for(longest, group.page_size)
    if pages > group.kv_tokens // group.page_size:
        raise NoCapacity(
            f"a prompt of {longest} tokens does not fit into a group's {group.kv_tokens} tokens "
            "of KV: give its stages more memory"
        )
    whole = max(a.input_tokens + a.output_tokens for a in arrivals)
    if whole > decode.kv_tokens:
        raise NoCapacity(
            f"a sequence of {whole} tokens does not fit into a decode worker's "
            f"{decode.kv_tokens} tokens of KV: give it more memory"
        )


def _lone_seconds(arrivals: list[Arrival], group: GroupModel) -> float:
    longest = max(arrivals, key=lambda a: a.input_tokens)
    return simulate_prefill([longest], group, 1).ready[0] - longest.time


def _judge(
    arrivals: list[Arrival], prefill: PrefillOutcome, outcome: DecodeOutcome, targets: Targets
) -> Candidate:
    ttft = percentile(outcome.ttft, targets.percent)
    itl = outcome.gaps.percentile(targets.percent)
    return Candidate(
        groups=prefill.groups,
        workers=outcome.workers,
        ttft_p50=percentile(outcome.ttft, 50),
        ttft=ttft,
        itl_p50=outcome.gaps.percentile(50),
        itl=itl,
        prefill_utilisation=prefill.utilisation,
        decode_utilisation=outcome.utilisation,
        cached_share=prefill.cached_tokens / sum(a.input_tokens for a in arrivals),
        meets=ttft <= targets.ttft and itl <= targets.itl,
    )


def _without_decode(
    arrivals: list[Arrival], prefill: PrefillOutcome, waits: list[float], targets: Targets
) -> Candidate:
    """Return what prefill alone already makes impossible; decode was not simulated (0 workers)."""
    return Candidate(
        groups=prefill.groups,
        workers=0,
        ttft_p50=percentile(waits, 50),
        ttft=percentile(waits, targets.percent),
        itl_p50=0.0,
        itl=0.0,
        prefill_utilisation=prefill.utilisation,
        decode_utilisation=0.0,
        cached_share=prefill.cached_tokens / sum(a.input_tokens for a in arrivals),
        meets=False,
    )
