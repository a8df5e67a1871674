"""The published system's rules, the fit, and Penstock's scheduler on the same hardware."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.simulator.calibration import (
    ModelCosts,
    calibrate,
    lock_step_ttft,
    minimise,
    rule_of,
)
from penstock_runtime.simulator.group import scheduler_for
from penstock_runtime.simulator.hardware import Hardware, StageModel
from penstock_runtime.simulator.published import DEEPSEEK, PROMPT, QWEN
from penstock_runtime.simulator.published_rules import (
    DynamicRule,
    FixedRule,
    LockStepScheduler,
    lengths,
    lock_step_makespan,
)
from penstock_runtime.simulator.replay import replay

N = PROMPT
DESIGN = Cost(c=0.01, gamma=0.0, b=3.5 / N, a=3.5 / N / N)


def test_worked_examples_of_the_design() -> None:
    """7 s of work a stage, eight stages, 10 ms a step, as many steps in flight as there are."""

    def makespan(rule: FixedRule | DynamicRule) -> float:
        times = [DESIGN.chunk(*chunk) for chunk in lengths(rule, N)]
        return lock_step_makespan(times, 8, 1000)

    assert makespan(DynamicRule(18_432, 0.8, DESIGN)) == pytest.approx(12.3, abs=0.1)
    # By hand: 7.22 s in 22 steps, and 7 times the 21st: 0.164 s linear, 0.315 s attention, 10 ms.
    assert makespan(FixedRule(6144)) == pytest.approx(7.22 + 7 * 0.489, abs=0.01)


def test_the_dynamic_rule_aims_at_the_first_chunks_time() -> None:
    strict = DynamicRule(18_432, 1.0, DESIGN)
    chunks = lengths(strict, N)
    whole = [c for c in chunks[:-1] if c[1] > 18_432 // 4]
    times = [DESIGN.chunk(*chunk) for chunk in whole]
    assert max(times) < 1.02 * min(times)
    none = lengths(DynamicRule(18_432, 0.0, DESIGN), N)
    assert none == lengths(FixedRule(18_432), N)
    # Never below a quarter of the first, and whole multiples of 64.
    long = [n for _, n in lengths(strict, 40 * N)[:-1]]
    assert min(long) == 18_432 // 4
    assert all(length % 64 == 0 for length in long)


@settings(max_examples=30, deadline=None)
@given(
    stages=st.integers(1, 6),
    prompts=st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    chunk=st.sampled_from([100, 512, 1000]),
    in_flight=st.sampled_from([1, 2, 6]),
)
def test_events_and_recursion_agree(
    stages: int, prompts: list[int], chunk: int, in_flight: int
) -> None:
    cost = Cost(c=1e-3, gamma=1e-8, b=1e-5, a=1e-8)
    rule = FixedRule(chunk)
    ran = replay(
        LockStepScheduler(stages, rule, in_flight),
        Hardware.uniform(stages, StageModel(cost), ring_slots=100),
        prompts,
        page_size=16,
    )
    times = [cost.chunk(*c) for prompt in prompts for c in lengths(rule, prompt)]
    assert ran.makespan == pytest.approx(lock_step_makespan(times, stages, in_flight))


def test_growing_chunks_wait_for_each_other_in_lock_step() -> None:
    times = [1.0, 2.0, 3.0] * 5
    free = lock_step_makespan(times, 3, 1000)
    assert free == pytest.approx(sum(times) + 2 * max(times))
    assert lock_step_makespan(times, 3, 3) > 1.2 * free


def test_a_minimum_is_found() -> None:
    found = minimise(lambda p: (p[0] - 1) ** 2 + 10 * (p[1] - p[0] ** 2) ** 2, [-0.5, 1.0])
    assert found == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.fixture(scope="module")
def qwen() -> ModelCosts:
    return calibrate(QWEN)


def test_rows_that_were_not_fitted_are_predicted(qwen: ModelCosts) -> None:
    for published, costs in ((QWEN, qwen), (DEEPSEEK, calibrate(DEEPSEEK))):
        errors = [
            abs(math.log(lock_step_ttft(costs, row, published.smoothing) / row.ttft))
            for row in published.rows
            if row.dynamic or (row.stages, row.chunk) not in published.calibrated
        ]
        # The charts can be read to 5 %.
        assert max(errors) < 0.06
        assert sum(errors) / len(errors) < 0.035


def test_throughput_is_predicted_although_none_was_fitted(qwen: ModelCosts) -> None:
    row = QWEN.row(8, 18_432, dynamic=True)
    assert row.throughput is not None
    stage = qwen.stage(8)
    rule = rule_of(row, stage, QWEN.smoothing)
    times = [stage.seconds([Chunk(*c)]) for c in lengths(rule, N)] * 16
    queue = 16 * N / lock_step_makespan(times, 8, 8)
    assert queue == pytest.approx(row.throughput, rel=0.05)
    # Neither sending each prompt behind the other's end, nor an endless queue, explains it.
    assert 16 * N / lock_step_makespan(times, 8, 1000) > 1.2 * row.throughput
    assert N / lock_step_ttft(qwen, row, QWEN.smoothing) < 0.85 * row.throughput


def test_penstock_on_the_same_hardware(qwen: ModelCosts) -> None:
    stage = qwen.stage(8)
    chunks = ChunkSettings(max_tokens=18_432, saturation_tokens=512)

    def seconds(prompts: int) -> float:
        scheduler = scheduler_for(
            [stage.cost] * 8, PagePool(2048 * prompts, 64), chunks, learn=True
        )
        hardware = Hardware.uniform(8, stage)
        return replay(scheduler, hardware, [N] * prompts, page_size=64).makespan

    row = QWEN.row(8, 18_432, dynamic=True)
    assert seconds(1) < 0.85 * lock_step_ttft(qwen, row, QWEN.smoothing)
    one_stage = sum(qwen.stage(1).seconds([Chunk(s, 18_432)]) for s in range(0, N, 18_432))
    assert 6 * one_stage / seconds(6) > 6.8
