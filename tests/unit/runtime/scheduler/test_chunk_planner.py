"""The chunk planner: coverage, equal times, and how near the best makespan it comes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.scheduler.chunk_planner import (
    ChunkPlanner,
    ChunkSettings,
    taper,
)
from penstock_runtime.scheduler.cost_model import Cost

N = 131072
DESIGN = Cost(c=0.01, gamma=0.0, b=3.5 / N, a=3.5 / N / N)
"""7 s of work in 128K tokens, half of it attention; 10 ms a step."""

PROMPTS = st.tuples(st.integers(0, 500), st.integers(1, 300_000))
"""(cached pages, tokens to compute)"""
COSTS = st.builds(
    Cost,
    c=st.floats(1e-3, 1e-1),
    gamma=st.sampled_from([0.0, 1e-9, 1e-7]),
    b=st.floats(1e-6, 1e-3),
    a=st.sampled_from([0.0, 1e-12, 1e-10, 1e-8]),
)


def planner(stages: int, page_size: int = 64, **options: object) -> ChunkPlanner:
    chosen = {"max_tokens": 1 << 20, "saturation_tokens": 0, "max_seconds": 1e9} | options
    return ChunkPlanner(stages, page_size, ChunkSettings(**chosen))  # type: ignore[arg-type]


def bound(work: float, c: float, stages: int) -> float:
    return (math.sqrt(work) + math.sqrt((stages - 1) * c)) ** 2


def test_worked_example_of_the_design() -> None:
    plan = planner(8).plan(DESIGN, 0, N)
    best = bound(7.0, 0.01, 8)
    assert len(plan) == 70
    assert best == pytest.approx(8.47)
    # Pages of 64 tokens keep it from being met exactly.
    assert best <= planner(8).makespan(DESIGN, plan) <= 1.005 * best
    assert plan[0].length > 2.5 * plan[-1].length


@settings(max_examples=60, deadline=None)
@given(
    cost=COSTS,
    prompt=PROMPTS,
    stages=st.integers(1, 16),
    page_size=st.sampled_from([1, 16, 64]),
    max_tokens=st.sampled_from([64, 1000, 8192]),
    queued=st.sampled_from([0, 10_000, 1_000_000]),
    mode=st.sampled_from(["adaptive", "fixed"]),
)
def test_chunks_cover_the_prompt_in_order_on_page_boundaries(
    cost: Cost,
    prompt: tuple[int, int],
    stages: int,
    page_size: int,
    max_tokens: int,
    queued: int,
    mode: str,
) -> None:
    start = prompt[0] * page_size
    end = start + min(prompt[1], 300 * max_tokens)
    made = planner(stages, page_size, max_tokens=max_tokens, mode=mode, fixed_tokens=500)
    position = start
    for chunk in made.plan(cost, start, end, queued):
        assert chunk.start == position
        assert chunk.start % page_size == 0
        assert 0 < chunk.length <= max_tokens
        position += chunk.length
    assert position == end


@settings(max_examples=40, deadline=None)
@given(cost=COSTS, prompt=PROMPTS, stages=st.integers(2, 16))
def test_times_are_equal_but_for_a_page(cost: Cost, prompt: tuple[int, int], stages: int) -> None:
    start = prompt[0] * 16
    plan = planner(stages, 16).plan(cost, start, start + prompt[1])
    times = [cost.chunk(*chunk) for chunk in plan]
    mean = sum(times) / len(times)
    for chunk, time in zip(plan, times, strict=True):
        end = chunk.start + chunk.length
        page = cost.work(end, end + 16) + cost.gamma * 16
        assert time <= 1.01 * mean + page
    if cost.a and len(plan) > 2:
        lengths = [chunk.length for chunk in plan]
        assert lengths[0] + 16 >= lengths[-2]


@settings(max_examples=20, deadline=None)
@given(
    cost=COSTS,
    tokens=st.integers(1000, 200_000),
    cached=st.integers(0, 1000),
    stages=st.integers(2, 16),
)
def test_makespan_is_near_the_best_of_all_counts(
    cost: Cost, tokens: int, cached: int, stages: int
) -> None:
    made = planner(stages, 16)
    start, end = 16 * cached, 16 * cached + tokens
    chosen = made.makespan(cost, made.plan(cost, start, end))
    counts = sorted({round(1.2**n) for n in range(32)})
    best = min(made.makespan(cost, made.equal_times(cost, start, end, m)) for m in counts)
    # `overhead` lets it stop 2 % short of the best for very long prompts, and with few pages in a
    # chunk the best count is the one that happens to divide them.
    page = cost.chunk(end, 16) - cost.c - cost.gamma * end
    assert chosen <= 1.03 * best + (stages - 1) * page


@settings(max_examples=40, deadline=None)
@given(cost=COSTS, tokens=st.integers(20_000, 200_000), stages=st.integers(2, 16))
def test_makespan_is_near_the_bound(cost: Cost, tokens: int, stages: int) -> None:
    free = Cost(cost.c, 0.0, cost.b, cost.a)
    made = planner(stages, 16)
    makespan = made.makespan(free, made.plan(free, 0, tokens))
    best = bound(free.work(0, tokens), free.c, stages)
    assert best * (1 - 1e-9) <= makespan <= 1.05 * best + stages * free.chunk(tokens, 16)


def test_a_queue_makes_fewer_and_larger_chunks_down_to_the_overhead() -> None:
    counts = [len(planner(8).plan(DESIGN, 0, N, queued)) for queued in (0, N, 4 * N, 10**9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[1] == round(70 / math.sqrt(2))
    # 7 s in chunks of which 10 ms is 2 %.
    assert counts[-1] == 14


def test_a_prompt_by_itself_has_the_best_chunks_however_long_it_is() -> None:
    # √(W c) is 0.7 s, where c is 0.7 % of a chunk.
    cost = Cost(c=5e-3, gamma=0.0, b=1e-3, a=0.0)
    plan = planner(2, 16).plan(cost, 0, 100_000)
    assert len(plan) == round(math.sqrt(100 / 5e-3))
    # Others that wait do not make them larger still.
    assert len(planner(2, 16).plan(cost, 0, 100_000, 10**9)) == len(plan)


def test_taper_by_hand() -> None:
    # 0.89 and what measuring costs: 0.9. One stage behind may have chunks of 0.9 of the one before.
    assert taper([1.0, 0.89]) == pytest.approx(0.1)
    # Of two, the second has chunk k at T + 0.9 t, and is done with the one before 1.8 t' behind T'.
    assert taper([1.0, 0.8, 0.89]) == pytest.approx(1 - 1.8 / 1.9)
    assert taper([2.0, 1.99]) == taper([1.0, 1.0]) == taper([0.9, 1.0, 0.5]) == 0
    assert taper([1.0]) == taper([0.0, 0.0]) == 0


@given(
    seconds=st.floats(0.01, 10),
    faster=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=7),
    chunks=st.integers(2, 40),
)
def test_chunks_that_shrink_by_the_taper_never_wait(
    seconds: float, faster: list[float], chunks: int
) -> None:
    shares = [1.0, *(1 - share for share in faster)]
    shrink = 1 - taper([seconds * share for share in shares])
    done = [0.0] * len(shares)
    for chunk in range(chunks):
        there = 0.0
        for stage, share in enumerate(shares):
            if stage:
                assert shrink == 1 or there >= done[stage] * (1 - 1e-9)
            there = done[stage] = max(there, done[stage]) + seconds * share * shrink**chunk


def test_chunks_shrink_with_what_is_left() -> None:
    made, cost = planner(2), Cost(c=1e-2, gamma=0.0, b=1e-3, a=0.0)
    equal = made.chunk_work(cost, 40, 0)
    assert equal == pytest.approx(math.sqrt(40 * 1e-2))
    first, last = (made.chunk_work(cost, 40, 0, left=left, taper=0.05) for left in (40.0, 0.0))
    assert first == pytest.approx(last + 2)
    assert last < 0.3 * equal
    # As many seconds of bubble as further chunks would cost.
    assert last * (last + 2) == pytest.approx(40 * 1e-2)


def test_a_single_stage_has_no_bubble_to_hide() -> None:
    assert len(planner(1).plan(DESIGN, 0, N)) == 14


def test_saturation_bounds_chunks_from_below() -> None:
    tiny = Cost(c=1e-6, gamma=0.0, b=1e-4, a=0.0)
    plan = planner(8, 16, saturation_tokens=512).plan(tiny, 0, 10_000)
    assert all(chunk.length >= 480 for chunk in plan)


def test_longest_step_is_bounded() -> None:
    slow = Cost(c=1.0, gamma=0.0, b=1e-3, a=0.0)
    plan = planner(2, 16, max_seconds=2.0).plan(slow, 0, 100_000)
    assert max(chunk.length for chunk in plan) <= 2016


def test_memory_bounds_the_first_chunks_and_the_rest_are_equal() -> None:
    made = planner(8, 64, max_tokens=2048)
    plan = made.plan(DESIGN, 0, N)
    assert plan[0].length == 2048
    late = [DESIGN.chunk(*chunk) for chunk in plan if chunk.length < 2000]
    assert max(late) < 1.1 * min(late)


def test_fixed_chunks_have_one_size() -> None:
    plan = planner(8, mode="fixed", fixed_tokens=6000).plan(DESIGN, 64, 20_000)
    assert [chunk.length for chunk in plan] == [5952, 5952, 5952, 20_000 - 64 - 3 * 5952]


def test_a_prompt_of_less_than_a_page_is_one_chunk() -> None:
    linear = Cost(c=1e-3, gamma=0.0, b=1e-3, a=0.0)
    assert planner(5, 16).equal_times(linear, 0, 10, 2) == [(0, 10)]
    assert planner(5, 16).plan(linear, 0, 10) == [(0, 10)]


def test_nothing_to_compute_is_no_chunk() -> None:
    assert planner(4).plan(DESIGN, 100, 100) == []


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"overhead": 1.0}, {"max_seconds": 0.0}, {"max_tokens": 63}]
)
def test_impossible_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step|settings"):
        planner(2, 64, **options)
