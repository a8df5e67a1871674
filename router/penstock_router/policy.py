"""Which decode worker and which prefill group answer a prompt: pure scoring, in seconds.

The cost of a pair is the time until its client has the answer:

    cost = wait for KV room on the decode worker
         + queue of whoever prefills + prefill of the uncached part
         + expected output tokens x the decode worker's time a token once this request is in

Every term comes from what the workers publish (`Load`) and from the prefix index; nothing is a
request count, and a slow worker beside a fast one needs no weight.

Of pairs that cost the same, the one whose decode worker needs the fewest new pages wins: what the
prefill group has cached saves the computing wherever it goes, but not the sending and the room.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING

from penstock_wire.messages import CostCoefficients, Load

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

UNKNOWN_COST = CostCoefficients(c=0.01, gamma=0.0, b=1e-4, a=0.0)
"""Of a worker that has not measured itself yet: about a small model on a CPU. It only has to make
less uncached work look cheaper; a colleague's published cost is preferred to it."""

EXPECTED_OUTPUT = 128
"""Output tokens that an answer is expected to have when it may have more: the order of magnitude of
a chat's turn. It weighs the decode worker's speed against the wait for the first token."""

TIE = 0.02
"""Costs within this share of the best are ties: finer differences are noise of the cost model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one request asks for, in tokens."""

    prompt_tokens: int
    """The prompt, with what earlier attempts already generated."""
    max_output: int
    """Output tokens still allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCandidate:
    """A decode worker that is there, as the scoring sees it."""

    name: str
    load: Load
    kv_layout: str
    model_digest: str
    page_size: int
    cached_tokens: int = 0
    """Of this prompt, in the worker's prefix cache."""
    routed: int = 0
    """Requests sent to it that its Load cannot include yet."""
    routed_seconds: float = 0.0
    """Predicted prefill time of those."""
    routed_pages: int = 0
    """Predicted pages of those."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCandidate:
    """A prefill group whose stage 0 is there."""

    name: str
    load: Load
    kv_layout: str
    model_digest: str
    cached_tokens: int = 0
    routed_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A pair, and what was predicted for it."""

    decode: str
    group: str
    """Empty: the decode worker prefills for itself."""
    cost: float
    """Seconds, see the head of this file."""
    prefill_seconds: float
    """Of the uncached part, without queues."""
    pages: int
    """New pages that the decode worker needs."""
    cached_tokens: int


def prefill_seconds(cost: CostCoefficients, stages: int, cached: int, new: int) -> float:
    """Return the predicted time to prefill `new` tokens after `cached` ones, in seconds.

    With W = t(L, x) - c the work of the whole prompt and P stages, M chunks of equal time take
    (W + M c)(1 + (P - 1) / M). That is least at M* = sqrt((P - 1) W / c), where it is
    (sqrt(W) + sqrt((P - 1) c))²; one chunk, (W + c) P, is best when M* < 1 and for one stage. The
    formula is that of the prefill pipeline's chunk plan, with `cost` that of the slowest stage.
    Left out: the queue, and that small chunks lose efficiency.
    """
    if new <= 0:
        return 0.0
    launch = max(0.0, cost.c)
    work = max(0.0, cost.gamma * cached + cost.b * new + cost.a * (2.0 * cached * new + new * new))
    if stages <= 1 or (stages - 1) * work <= launch:
        return (work + launch) * max(1, stages)
    return (sqrt(work) + sqrt((stages - 1) * launch)) ** 2


def choose(
    demand: Demand,
    decodes: Sequence[DecodeCandidate],
    groups: Sequence[GroupCandidate],
    *,
    require_prefill: bool,
    rng: random.Random,
) -> Choice | None:
    """Return the cheapest pair; None if no pair can take the request.

    Ties go to those that need the fewest new pages, and are broken at random among these.

    A decode worker is paired only with groups of its KV layout and model whose every stage has a
    verified link to it (`Load.groups_ready`). Workers that are not ready, and those whose whole KV
    is smaller than the prompt, are no candidates.
    """
    cost, step = _colleague_cost(decodes, groups), _colleague_step(decodes)
    choices = [
        _score(demand, decode, group, cost, step)
        for decode in decodes
        if _can_hold(demand, decode)
        for group in _partners(decode, groups, require_prefill=require_prefill)
    ]
    if not choices:
        return None
    best = min(choice.cost for choice in choices)
    near = [choice for choice in choices if choice.cost <= best * (1 + TIE) + 1e-6]
    fewest = min(choice.pages for choice in near)
    return rng.choice([choice for choice in near if choice.pages == fewest])


def _can_hold(demand: Demand, decode: DecodeCandidate) -> bool:
    pages = _pages(demand.prompt_tokens + 1, decode.page_size)
    return decode.load.state == "ready" and pages <= decode.load.pages_total


def _partners(
    decode: DecodeCandidate, groups: Sequence[GroupCandidate], *, require_prefill: bool
) -> list[GroupCandidate | None]:
    """Return the groups that may prefill for `decode`; None stands for itself."""
    partners: list[GroupCandidate | None] = [
        group
        for group in groups
        if group.load.state == "ready"
        and group.kv_layout == decode.kv_layout
        and group.model_digest == decode.model_digest
        and group.name in decode.load.groups_ready
    ]
    return partners if partners or require_prefill else [None]


def _score(
    demand: Demand,
    decode: DecodeCandidate,
    group: GroupCandidate | None,
    fallback_cost: CostCoefficients,
    fallback_step: float,
) -> Choice:
    load = decode.load
    # A stage that has less than the decode worker reads the rest from there, and one that has more
    # sends it, so the longer prefix of the two counts. The last prompt token is always computed.
    cached = max(decode.cached_tokens, group.cached_tokens if group else 0)
    cached = min(cached, demand.prompt_tokens - 1)
    new = demand.prompt_tokens - 1 - cached
    if group is None:
        queued = load.queued_seconds + decode.routed_seconds
        prefill = prefill_seconds(load.cost or fallback_cost, 1, cached, new)
    else:
        queued = group.load.queued_seconds + group.routed_seconds
        prefill = prefill_seconds(group.load.cost or fallback_cost, group.load.stages, cached, new)
    output = min(demand.max_output, EXPECTED_OUTPUT)
    step = load.step_seconds or fallback_step
    token_seconds = step + load.step_seconds_per_request * (1 + decode.routed)
    pages = _pages(demand.prompt_tokens + output, decode.page_size)
    pages -= min(decode.cached_tokens, demand.prompt_tokens - 1) // decode.page_size
    room = _room_seconds(decode, pages, token_seconds)
    return Choice(
        decode=decode.name,
        group=group.name if group else "",
        cost=room + queued + prefill + output * token_seconds,
        prefill_seconds=prefill,
        pages=pages,
        cached_tokens=cached,
    )


def _room_seconds(decode: DecodeCandidate, pages: int, token_seconds: float) -> float:
    """Return the predicted wait until `pages` are free, in seconds.

    Little's law: pages in use come back at the rate used / (expected tokens x time a token).
    """
    load = decode.load
    short = pages + decode.routed_pages - load.pages_free
    if short <= 0:
        return 0.0
    used = max(1, load.pages_total - load.pages_free + decode.routed_pages)
    return short / used * EXPECTED_OUTPUT * token_seconds


def _colleague_cost(
    decodes: Iterable[DecodeCandidate], groups: Iterable[GroupCandidate]
) -> CostCoefficients:
    """Return the cost that stands in for one not published yet."""
    for candidates in (groups, decodes):
        for candidate in candidates:
            if candidate.load.cost is not None:
                return candidate.load.cost
    return UNKNOWN_COST


def _colleague_step(decodes: Iterable[DecodeCandidate]) -> float:
    """Return the step time that stands in for that of a worker which has not decoded yet.

    Without it a new worker would look infinitely fast beside one that is warm, and take prompts
    from where their prefix lies.
    """
    known = [d.load.step_seconds for d in decodes if d.load.step_seconds > 0]
    return median(known) if known else 0.0


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // max(1, page_size))
