"""How a step is shared: budgets, pages, and who goes first."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.scheduler.step_sharing import Prompt, best_seconds, share

LINEAR = Cost(c=1.0, gamma=0.0, b=1.0, a=0.0)
"""A token takes a second: seconds and tokens can be read off each other."""


def shared(prompts: list[Prompt], seconds: float, tokens: int = 1000) -> dict[int, int]:
    items = share(LINEAR, prompts, 4, seconds, tokens, oldest_share=0.5)
    return {item.key: item.length for item in items}


def test_one_prompt_has_the_step_to_itself() -> None:
    assert shared([Prompt(0, 0, 8, 100)], 20) == {0: 20}


def test_the_shorter_goes_first_and_the_oldest_keeps_its_claim() -> None:
    long, short = Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 8)
    assert shared([long, short], 20) == {1: 8, 0: 12}
    assert shared([long, Prompt(1, 0, 0, 50)], 24) == {1: 12, 0: 12}


def test_a_younger_prompt_of_the_same_length_waits() -> None:
    assert shared([Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 100)], 20) == {0: 20}


def test_several_short_prompts_share_a_step() -> None:
    prompts = [Prompt(0, 0, 0, 100), *(Prompt(k, 0, 0, 3) for k in range(1, 4))]
    assert shared(prompts, 20) == {1: 3, 2: 3, 3: 3, 0: 12}


def test_the_oldest_moves_by_a_page_whatever_it_costs() -> None:
    assert shared([Prompt(0, 0, 0, 100)], 1e-9) == {0: 4}
    assert shared([Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 9)], 1e-9) == {0: 4}


def test_chunks_are_cut_at_pages_or_at_the_end() -> None:
    assert shared([Prompt(0, 0, 4, 31)], 13.9) == {0: 12}
    # A remainder of less than half a page is taken along.
    assert shared([Prompt(0, 0, 4, 31)], 26) == {0: 27}


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 300)), min_size=1, max_size=8),
    seconds=st.floats(0, 500),
    tokens=st.integers(4, 200),
    oldest_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_every_step_keeps_its_limits_and_moves_the_oldest(
    lengths: list[tuple[int, int]], seconds: float, tokens: int, oldest_share: float
) -> None:
    prompts = [Prompt(k, 0, 4 * p, 4 * p + n) for k, (p, n) in enumerate(lengths)]
    items = share(LINEAR, prompts, 4, seconds, tokens, oldest_share)
    taken = {item.key: item for item in items}
    assert sum(item.length for item in items) <= tokens
    # Rounding to the nearest page may exceed the time by half a page for each.
    assert sum(item.length for item in items) <= seconds + 4 + 2 * len(items)
    oldest = taken[0]
    claim = min(seconds * oldest_share, oldest_share * tokens, float(lengths[0][1]))
    assert oldest.length >= min(claim - 2 * len(items) - 4, lengths[0][1])
    for item in items:
        prompt = prompts[item.key]
        assert item.start == prompt.planned
        assert item.length > 0
        assert item.last == (item.start + item.length == prompt.end)
        assert item.last or (item.start + item.length) % 4 == 0


def test_nobody_shares_nothing() -> None:
    assert share(LINEAR, [], 4, 10, 10, 0.5) == []


def test_attention_makes_late_chunks_shorter() -> None:
    cost = Cost(c=1.0, gamma=0.0, b=1.0, a=0.01)
    lengths = [
        share(cost, [Prompt(0, 0, planned, 4000)], 4, 100, 1000, 0.5)[0].length
        for planned in (0, 400, 3000)
    ]
    # Roots of 0.01 x² + (1 + 0.02 L) x = 100: 61.8, 11.0, 1.6, to the nearest page.
    assert lengths == [60, 12, 4]


# --- how long a step is to be --------------------------------------------------------------------


def steps_of_a_lone_prompt(cost: Cost, stages: int, tokens: int) -> list[float]:
    """Return the times of the steps that a prompt gets, one after the other."""
    planner = ChunkPlanner(stages, 16, ChunkSettings(max_tokens=1 << 20, max_seconds=1e9))
    times: list[float] = []
    planned = 0
    while planned < tokens:
        prompt = Prompt(0, 0, planned, tokens)
        seconds = best_seconds(planner, cost, [prompt], 0.0)
        (item,) = share(cost, [prompt], 16, seconds, 1 << 20, 0.5)
        times.append(cost.chunk(item.start, item.length))
        planned += item.length
    return times


@settings(max_examples=400, deadline=None)
@given(
    # Reading a cached token costs at most a fraction of computing one.
    ratio=st.sampled_from([0.0, 1e-17, 1e-6, 1e-4, 1e-3, 1e-2, 0.06, 0.2]),
    b=st.sampled_from([1e-6, 1e-5, 1e-4]),
    a=st.sampled_from([0.0, 1e-11, 1e-9]),
    c=st.floats(1e-3, 5e-2),
    stages=st.integers(2, 16),
    tokens=st.integers(20_000, 200_000),
)
def test_steps_one_by_one_are_as_good_as_planned_at_once(
    ratio: float, b: float, a: float, c: float, stages: int, tokens: int
) -> None:
    cost = Cost(c, ratio * b, b, a)
    times = steps_of_a_lone_prompt(cost, stages, tokens)
    makespan = sum(times) + (stages - 1) * max(times)
    planner = ChunkPlanner(stages, 16, ChunkSettings(max_tokens=1 << 20, max_seconds=1e9))
    at_once = planner.makespan(cost, planner.plan(cost, 0, tokens))
    page = cost.work(tokens - 16, tokens)
    # Where reading is dearest, rounding to whole steps was seen to cost 6.4 %.
    allowed = 1.08 if ratio == 0.2 else 1.06
    assert makespan <= allowed * at_once + stages * page


def test_equal_steps_where_reading_the_prefix_is_dear() -> None:
    # Half of the last step is reading.
    times = steps_of_a_lone_prompt(Cost(1e-2, 7e-7, 1e-5, 6e-10), 4, 131_072)[:-1]
    assert max(times) < 1.05 * min(times)


def test_tokens_that_cost_nothing_all_go_into_one_step() -> None:
    free = Cost(c=1e-2, gamma=0.0, b=0.0, a=0.0)
    prompt = Prompt(0, 0, 0, 1000)
    planner = ChunkPlanner(4, 16)
    assert best_seconds(planner, free, [prompt], 0.0) == math.inf
