"""How one step of a prefill pipeline is shared among the requests in it.

A step takes about the time that is best for all the work there is, and every request gets a slice.
The oldest has a claim to a fixed share, the rest goes to whoever has least left. So a short prompt
overtakes a very long one, several short ones share a step, prompts of one size are served in their
order, and none starves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from penstock_wire.messages import ChunkItem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.scheduler.chunk_planner import ChunkPlanner
    from penstock_runtime.scheduler.cost_model import Cost


class Prompt(NamedTuple):
    """A prompt of which tokens [start, end) are to be computed; [start, planned) are in plans."""

    key: int
    """Rises with arrival."""
    start: int
    planned: int
    end: int


def best_seconds(
    planner: ChunkPlanner,
    cost: Cost,
    prompts: Sequence[Prompt],
    queued_work: float,
    taper: float = 0.0,
) -> float:
    """Return the seconds, besides c, that a pipeline's next step should take.

    The best time follows from all the work of the requests that are here, with what is done of it:
    steps do not shrink as the work does, unless the stages allow it (`taper`). As many steps as
    that makes of what is left are then made equal.

    Args:
        planner: of the pipeline.
        cost: of its slowest stage.
        prompts: with tokens left to plan, at least one.
        queued_work: seconds of work that waits behind them.
        taper: of the pipeline's stages, see `chunk_planner.taper`.
    """
    if planner.settings.mode == "fixed":
        return math.inf
    works = [cost.work(p.start, p.end) for p in prompts]
    longest = max(works)
    left = queued_work + sum(cost.work(p.planned, p.end) for p in prompts)
    if left <= 0:
        # Tokens cost nothing, as far as is known: steps then do.
        return math.inf
    context = sum((p.start + p.end) / 2 for p in prompts) / len(prompts)
    work = planner.chunk_work(
        cost,
        longest,
        context,
        queued=queued_work + sum(works) - longest,
        left=left,
        taper=taper,
    )
    furthest = cost.gamma * max(p.end for p in prompts)
    if furthest <= _NEGLIGIBLE * work:
        # All of it is added, or the last step would leave a few tokens to another one.
        return left / max(1, round(left / work)) + furthest
    # Of a step's time, reading the prefix leaves less and less for work: equal steps have less and
    # less work. Half of the best work is left to the last of them at least.
    wanted = max(work + cost.gamma * context, work / 2 + furthest)
    steps = max(1, round(_steps_of(cost, prompts, queued_work, context, wanted)))
    low = left / steps
    high = low + furthest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _steps_of(cost, prompts, queued_work, context, middle) > steps:
            low = middle
        else:
            high = middle
    return high


_NEGLIGIBLE = 0.01
"""Share of a step's work below which reading the longest prefix does not make steps unequal."""
_HALVINGS = 10
"""Of an interval no longer than that reading takes: to a thousandth of it."""


def _steps_of(
    cost: Cost, prompts: Sequence[Prompt], queued_work: float, context: float, seconds: float
) -> float:
    """Return how many steps of `seconds`, besides c, compute what is left; infinite if none can.

    At position L a step has seconds - gamma L for work, and a token takes b + 2 a L of it: so it is
    the integral of (b + 2 a L) / (seconds - gamma L) over all positions that are left, by Gauss and
    Legendre: its closed form cancels for a gamma that is almost nothing. What is queued reads as
    much as the prompts that are here do in the mean.
    """
    if seconds <= cost.gamma * max(context, *(p.end for p in prompts)):
        return math.inf
    b, a, gamma = cost.b, 2 * cost.a, cost.gamma
    steps = queued_work / (seconds - gamma * context)
    for p in prompts:
        length = p.end - p.planned
        for share_of_length, weight in _GAUSS_LEGENDRE:
            position = p.planned + share_of_length * length
            steps += weight * length * (b + a * position) / (seconds - gamma * position)
    return steps


_GAUSS_LEGENDRE = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
"""Nodes and weights of three points on [0, 1]."""


def share(
    cost: Cost,
    prompts: Sequence[Prompt],
    page_size: int,
    seconds: float,
    tokens: int,
    oldest_share: float,
) -> list[ChunkItem]:
    """Return the chunks of the next step.

    Args:
        cost: of the stage that sets the pace.
        prompts: with tokens left to plan, oldest first.
        page_size: chunks end where a page does, or the prompt.
        seconds: for the step, besides c. Exceeded by a page if the oldest would not move else.
        tokens: most of the step; at least a page if there are prompts.
        oldest_share: of the step, for the oldest prompt.
    """
    if not prompts:
        return []
    oldest = prompts[0]
    # What the oldest has a claim to, until its turn comes.
    claim = min(seconds * oldest_share, _remaining(cost, oldest))
    token_claim = max(page_size, min(math.ceil(tokens * oldest_share), oldest.end - oldest.planned))
    items: list[ChunkItem] = []
    for prompt in sorted(prompts, key=lambda p: (_remaining(cost, p), p.key)):
        least = 0
        if prompt is oldest:
            claim, token_claim, least = 0.0, 0, page_size
        wanted = cost.tokens_within(prompt.planned, seconds - claim)
        length = _round(prompt, wanted, tokens - token_claim, least, page_size)
        if length > 0:
            last = prompt.planned + length == prompt.end
            items.append(ChunkItem(prompt.key, prompt.planned, length, last))
            seconds -= cost.chunk(prompt.planned, length) - cost.c
            tokens -= length
    return items


def _round(prompt: Prompt, wanted: float, most: int, least: int, page_size: int) -> int:
    """Return a length near `wanted`: to the end of a page, or all that is left.

    At most `most`, and at least `least` as far as that allows. Not a page's end only if a page
    does not fit.
    """
    left = prompt.end - prompt.planned
    if left <= most and (left <= least or left - wanted < page_size / 2):
        return left
    # To the nearest page, so that the chunks' times stay equal in the mean.
    stop = round((prompt.planned + min(wanted, left)) / page_size) * page_size
    limit = (prompt.planned + most) // page_size * page_size
    return max(min(stop, limit) - prompt.planned, min(least, left, most))


def _remaining(cost: Cost, prompt: Prompt) -> float:
    return cost.work(prompt.planned, prompt.end)
