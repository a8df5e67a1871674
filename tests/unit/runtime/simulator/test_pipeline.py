"""The simulated pipeline: nothing overlaps, nothing is lost, and formulas that must hold do."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.simulator.clock import Clock
from penstock_runtime.simulator.group import scheduler_for
from penstock_runtime.simulator.hardware import Hardware, Link, StageModel
from penstock_runtime.simulator.pipeline import Pipeline
from penstock_runtime.simulator.replay import Replay, replay
from penstock_wire.messages import Admit, ChunkItem, StepPlan

if TYPE_CHECKING:
    from penstock_runtime.engine.timeline import StepSpan

PAGE = 16
COST = Cost(c=1e-3, gamma=0.0, b=1e-5, a=1e-9)
COSTS = st.builds(
    Cost,
    c=st.floats(1e-4, 1e-2),
    gamma=st.sampled_from([0.0, 1e-8, 1e-7]),
    b=st.floats(1e-6, 1e-4),
    a=st.sampled_from([0.0, 1e-10, 1e-8]),
)
PROMPTS = st.lists(st.integers(1, 3000), min_size=1, max_size=6)


def run(
    hardware: Hardware,
    prompts: list[int],
    *,
    in_turn: bool = False,
    learn: bool = False,
    max_tokens: int = 512,
) -> Replay:
    costs = [stage.cost for stage in hardware.stages]
    chunks = ChunkSettings(max_tokens=max_tokens, saturation_tokens=16)
    pages = sum(-(-prompt // PAGE) for prompt in prompts)
    scheduler = scheduler_for(costs, PagePool(pages, PAGE), chunks, learn=learn)
    return replay(
        scheduler, hardware, prompts, page_size=PAGE, in_turn=in_turn, record=True, seed=1
    )


@settings(max_examples=30, deadline=None)
@given(
    costs=st.lists(COSTS, min_size=1, max_size=5),
    prompts=PROMPTS,
    bandwidth=st.sampled_from([float("inf"), 1e8, 1e6]),
    latency=st.sampled_from([0.0, 1e-3]),
    noise=st.sampled_from([0.0, 0.3]),
    in_turn=st.booleans(),
    learn=st.booleans(),
)
def test_every_token_once_on_every_stage_and_no_stage_does_two_things(
    costs: list[Cost],
    prompts: list[int],
    bandwidth: float,
    latency: float,
    noise: float,
    in_turn: bool,
    learn: bool,
) -> None:
    hardware = Hardware(
        stages=tuple(StageModel(cost, 64) for cost in costs),
        activations=Link(bandwidth, latency),
        activation_bytes=128,
        kv=Link(bandwidth, latency),
        kv_bytes=64,
        control_latency=latency,
        noise=noise,
    )
    ran = run(hardware, prompts, in_turn=in_turn, learn=learn)
    _check_stages(ran.spans, len(costs))
    _check_hand_overs(ran.spans, latency)
    computed: Counter[int] = Counter()
    for span in ran.spans:
        if span.stage == 0:
            for chunk in span.chunks:
                # In order: each chunk begins where the one before it ended.
                assert computed[chunk.key] == chunk.start
                computed[chunk.key] += chunk.length
    assert sorted(computed.values()) == sorted(prompts)
    # Work conservation: what was computed is what the stages were busy with.
    for stage, busy in enumerate(ran.busy):
        own = sum(span.end - span.begin for span in ran.spans if span.stage == stage)
        assert busy == pytest.approx(own)
    # Nothing is ready before it is computed and sent.
    assert ran.makespan >= max(span.end for span in ran.spans) - 1e-12
    assert all(time > 0 for time in ran.ready)
    if in_turn:
        assert ran.ready == sorted(ran.ready)


def _check_stages(spans: list[StepSpan], stages: int) -> None:
    for stage in range(stages):
        own = [span for span in spans if span.stage == stage]
        assert [span.step for span in own] == sorted(span.step for span in own)
        for before, after in pairwise(own):
            assert after.begin >= before.end
        assert all(span.wait >= 0 for span in own)


def _check_hand_overs(spans: list[StepSpan], latency: float) -> None:
    ends = {(span.step, span.stage): span.end for span in spans}
    for span in spans:
        if span.stage:
            assert span.begin >= ends[span.step, span.stage - 1] + latency - 1e-12


@settings(max_examples=30, deadline=None)
@given(
    stages=st.integers(1, 8),
    chunks=st.integers(1, 40),
    seconds=st.floats(1e-3, 1.0),
)
def test_equal_chunks_take_what_the_formula_says(stages: int, chunks: int, seconds: float) -> None:
    model = StageModel(Cost(c=0.0, gamma=0.0, b=seconds / 32, a=0.0))
    plans = _plans([(32 * i, 32) for i in range(chunks)])
    pipeline = Pipeline(Hardware.uniform(stages, model), PAGE)
    end = max(pipeline.carry_out(plan, 0.0).steps[-1][2] for plan in plans)
    assert end == pytest.approx((chunks + stages - 1) * seconds)
    bubble = 1 - sum(pipeline.busy) / (stages * end)
    assert bubble == pytest.approx((stages - 1) / (stages - 1 + chunks))


@settings(max_examples=40, deadline=None)
@given(cost=COSTS, stages=st.integers(1, 8), tokens=st.integers(1, 20_000))
def test_a_lone_prompt_cut_by_the_planner_takes_its_makespan(
    cost: Cost, stages: int, tokens: int
) -> None:
    planner = ChunkPlanner(stages, PAGE, ChunkSettings(max_tokens=4096))
    chunks = planner.plan(cost, 0, tokens)
    pipeline = Pipeline(Hardware.uniform(stages, StageModel(cost), ring_slots=1000), PAGE)
    end = max(pipeline.carry_out(plan, 0.0).steps[-1][2] for plan in _plans(chunks))
    assert end == pytest.approx(planner.makespan(cost, chunks))


@settings(max_examples=40, deadline=None)
@given(cost=COSTS, stages=st.integers(1, 8), tokens=st.integers(64, 20_000))
def test_a_lone_prompt_cut_by_the_scheduler_takes_the_makespan_of_its_chunks(
    cost: Cost, stages: int, tokens: int
) -> None:
    ran = run(Hardware.uniform(stages, StageModel(cost)), [tokens])
    planner = ChunkPlanner(stages, PAGE, ChunkSettings(max_tokens=512))
    chunks = [Chunk(*span.chunks[0][1:3]) for span in ran.spans if span.stage == 0]
    # Two steps a stage are given ahead: more than enough while chunks do not grow.
    slack = max(cost.chunk(*chunk) for chunk in chunks)
    assert planner.makespan(cost, chunks) - 1e-9 <= ran.makespan
    assert ran.makespan <= planner.makespan(cost, chunks) + slack


def _plans(chunks: list[tuple[int, int]] | list[Chunk]) -> list[StepPlan]:
    total = sum(length for _, length in chunks)
    plans: list[StepPlan] = []
    for step, (start, length) in enumerate(chunks):
        admit = (
            Admit(
                key=0,
                grant=0,
                receiver="d",
                incarnation=1,
                pages=(),
                target_pages=(),
                length=total,
            ),
        )
        plans.append(
            StepPlan(
                step=step,
                epoch=0,
                items=(ChunkItem(0, start, length, start + length == total),),
                admit=admit if step == 0 else (),
                release=(),
            )
        )
    return plans


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_faster_stages_behind_the_first_make_the_last_chunks_shorter(stages: int) -> None:
    """And the pipeline faster than with equal chunks, of whatever size."""
    cost = Cost(c=4e-3, gamma=2e-8, b=1.2e-5, a=1.2e-9)
    faster = Cost(*(0.95 * value for value in cost.vector()))
    hardware = Hardware(stages=tuple(map(StageModel, [cost] + [faster] * (stages - 1))))
    tokens = 100_000
    ran = run(hardware, [tokens], max_tokens=8192)
    times = [span.end - span.begin for span in ran.spans if span.stage == 0]
    assert times[-1] < 0.8 * times[0]
    planner = ChunkPlanner(stages, PAGE, ChunkSettings(max_tokens=8192))
    for count in range(20, 200, 5):
        pipeline = Pipeline(hardware, PAGE)
        plans = _plans(planner.equal_times(cost, 0, tokens, count))
        end = max(pipeline.carry_out(plan, 0.0).steps[-1][2] for plan in plans)
        assert ran.makespan < 0.998 * end


def test_links_carry_one_thing_after_another() -> None:
    # A chunk computes in 10 ms and travels for 30: the link sets the pace.
    model = StageModel(Cost(c=0.01, gamma=0.0, b=0.0, a=0.0))
    hardware = Hardware.uniform(
        2, model, activations=Link(1000.0, 0.5), activation_bytes=1.0, ring_slots=100
    )
    pipeline = Pipeline(hardware, PAGE)
    begins = [pipeline.carry_out(p, 0.0).steps[1][1] for p in _plans([(0, 30), (30, 30), (60, 30)])]
    assert begins == pytest.approx([0.01 + 0.03 + 0.5, 0.07 + 0.5, 0.1 + 0.5])


def test_a_full_ring_holds_the_stage_in_front_up() -> None:
    # Stage 1 takes a second; the ring has one slot, so hand-over n leaves when n - 1 was taken in.
    stages = tuple(StageModel(Cost(c=c, gamma=0.0, b=0.0, a=0.0)) for c in (0.1, 1.0, 0.1))
    pipeline = Pipeline(
        Hardware(stages=stages, activations=Link(10.0), activation_bytes=1.0, ring_slots=1), PAGE
    )
    outcomes = [pipeline.carry_out(p, 0.0) for p in _plans([(16 * i, 16) for i in range(3)])]
    # Computed at 0.1, 0.2, 0.3; 1.6 s on the link each, behind each other.
    assert [o.steps[1][1] for o in outcomes] == pytest.approx([1.7, 3.3, 4.9])


def test_a_prompt_is_ready_when_its_kv_is_there() -> None:
    model = StageModel(Cost(c=0.01, gamma=0.0, b=0.0, a=0.0))
    hardware = Hardware.uniform(2, model, kv=Link(1000.0, 0.5), kv_bytes=2.0)
    ran = run(hardware, [100])
    # One step; the last stage ends at 20 ms, and 200 bytes take 0.2 s and half a second.
    assert ran.steps == 1
    assert ran.makespan == pytest.approx(0.02 + 0.2 + 0.5)


def test_pages_that_are_loaded_hold_the_first_chunk_up() -> None:
    model = StageModel(Cost(c=0.01, gamma=0.0, b=0.0, a=0.0))
    pipeline = Pipeline(Hardware.uniform(1, model, kv=Link(64.0), kv_bytes=1.0), PAGE)
    admit = Admit(
        key=0,
        grant=0,
        receiver="d",
        incarnation=1,
        pages=tuple(range(8)),
        target_pages=tuple(range(8)),
        load=(0, 4),
        send_from=4,
        start=64,
        length=128,
    )
    plan = StepPlan(
        step=0, epoch=0, items=(ChunkItem(0, 64, 64, True),), admit=(admit,), release=()
    )
    outcome = pipeline.carry_out(plan, 0.0)
    assert outcome.steps == [(0.0, 1.0, 1.01)]
    ((time, key),) = outcome.ready
    assert key == 0
    assert time == pytest.approx(1.01 + 1.0)


def test_unsaturated_linear_layers_cost_more_a_token() -> None:
    model = StageModel(Cost(c=0.0, gamma=0.0, b=1.0, a=0.0), saturation=1000)
    assert model.seconds([Chunk(0, 1)]) == pytest.approx(1000, rel=1e-3)
    assert model.seconds([Chunk(0, 100_000)]) == pytest.approx(100_000, rel=1e-3)
    assert model.seconds([Chunk(0, 1000)]) == pytest.approx(1000 * 2**0.5)
    assert model.seconds([]) == 0.0


def test_prompts_at_once_fill_the_bubble_that_each_alone_leaves() -> None:
    hardware = Hardware.uniform(4, StageModel(COST))
    together = run(hardware, [4000] * 6)
    in_turn = run(hardware, [4000] * 6, in_turn=True)
    assert together.makespan < 0.85 * in_turn.makespan
    assert together.bubble < in_turn.bubble
    assert in_turn.makespan == pytest.approx(6 * run(hardware, [4000]).makespan)


def test_a_slower_stage_sets_the_pace() -> None:
    slow = Cost(c=2e-3, gamma=0.0, b=2e-5, a=2e-9)
    even = run(Hardware.uniform(3, StageModel(slow)), [8000])
    one = run(Hardware(stages=tuple(StageModel(c) for c in (COST, slow, COST))), [8000])
    assert 0.8 * even.makespan < one.makespan < even.makespan


def test_nothing_is_done_in_the_past() -> None:
    clock = Clock()
    seen: list[float] = []
    clock.at(2.0, lambda: clock.at(1.0, seen.append, 1.0))
    with pytest.raises(ValueError, match="nothing can be done at 1"):
        clock.run()


def test_what_is_due_at_one_time_is_done_in_order() -> None:
    clock = Clock()
    seen: list[int] = []
    for number in range(5):
        clock.at(1.0, seen.append, number)
    clock.at(0.5, seen.append, -1)
    clock.run()
    assert seen == [-1, 0, 1, 2, 3, 4]
    assert clock.now == 1.0
