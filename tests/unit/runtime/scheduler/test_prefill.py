"""Stage 0's scheduler: trajectories of whole groups, and what each plan says."""

from __future__ import annotations

import math
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk, Cost, CostModel
from penstock_runtime.scheduler.prefill import (
    PrefillScheduler,
    PrefillSettings,
    PromptRefused,
)
from penstock_wire.messages import ChunkItem, StepDone, StepPlan
from tests.unit.runtime.scheduler.decode_simulation import prompt_of
from tests.unit.runtime.scheduler.prefill_simulation import (
    COST,
    RECEIVER,
    GroupSimulation,
    makespan,
    request,
    scheduler_of,
)


def done(plan: StepPlan, stage: int = 0, seconds: float = 0.01) -> StepDone:
    return StepDone(
        epoch=plan.epoch, step=plan.step, stage=stage, compute_seconds=seconds, wait_seconds=0.0
    )


def planned(scheduler: PrefillScheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.next_plan(now)
    assert plan is not None
    return plan


# --- one request ---------------------------------------------------------------------------------


def test_a_prompt_is_admitted_computed_and_released() -> None:
    pool = PagePool(16, 4)
    scheduler = scheduler_of(1, pool)
    tokens = prompt_of(10, 1)
    scheduler.add(request(7, tokens), 0.0)
    plan = planned(scheduler)
    assert plan.items == (ChunkItem(0, 0, 10, True),)
    assert plan.release == (0,)
    (admit,) = plan.admit
    assert (admit.grant, admit.receiver, admit.incarnation) == (7, RECEIVER, 1)
    assert (admit.pages, admit.target_pages) == ((0, 1, 2), (7000, 7001, 7002))
    assert (admit.load, admit.send_from, admit.start, admit.length) == ((0, 0), 0, 0, 10)
    assert scheduler.prompt(0, 2, 3) == tokens[2:5]
    scheduler.step_done(done(plan))
    assert pool.counts().resident == 3
    scheduler.released(0, 0, [0])
    # The two full pages are in the prefix cache, the partial one is free.
    assert (pool.counts().cached, scheduler.idle) == (2, True)
    assert scheduler.next_plan(1.0) is None


def test_an_own_cached_prefix_is_sent_but_not_computed() -> None:
    sim = GroupSimulation(0, 2, 32, 4)
    tokens = prompt_of(18, 1)
    sim.add(request(1, tokens))
    sim.run()
    sim.add(request(2, tokens + prompt_of(5, 2)))
    plan = planned(sim.scheduler)
    assert (plan.admit[0].start, plan.admit[0].send_from, plan.admit[0].load) == (16, 0, (0, 0))
    assert plan.items[0].start == 16


def test_a_prefix_that_only_the_receiver_has_is_loaded() -> None:
    sim = GroupSimulation(0, 2, 32, 4)
    tokens = prompt_of(23, 1)
    sim.add(request(1, tokens[:9]))
    sim.run()
    sim.add(request(2, tokens, cached=18))
    plan = planned(sim.scheduler)
    (admit,) = plan.admit
    assert (admit.load, admit.send_from, admit.start) == ((2, 4), 4, 16)
    for stage in sim.stages:
        stage.plans.append(plan)
    sim.run()
    # What was loaded is cached as well, once every stage has it.
    assert len(sim.pool.snapshot()) == 5


def test_a_prompt_that_is_cached_in_full_is_only_sent() -> None:
    sim = GroupSimulation(0, 2, 32, 4)
    tokens = prompt_of(16, 1)
    sim.add(request(1, tokens))
    sim.run()
    sim.add(request(2, tokens, cached=8))
    plan = planned(sim.scheduler)
    assert (plan.items, plan.release) == ((), (plan.admit[0].key,))
    assert (plan.admit[0].send_from, plan.admit[0].start, plan.admit[0].length) == (2, 16, 16)
    for stage in sim.stages:
        stage.plans.append(plan)
    sim.run()


def test_a_prompt_that_the_receiver_has_in_full_ends_at_once() -> None:
    sim = GroupSimulation(0, 2, 32, 4)
    sim.add(request(1, prompt_of(10, 1), cached=10))
    plan = planned(sim.scheduler)
    (admit,) = plan.admit
    assert (plan.items, plan.release, admit.load) == ((), (0,), (0, 0))
    assert admit.send_from == 3
    for stage in sim.stages:
        stage.plans.append(plan)
    sim.run()


@pytest.mark.parametrize(
    ("tokens", "cached", "pages", "reason"),
    [
        (10, 11, 3, "11 of 10 tokens"),
        (10, 0, 2, "need 3 pages of 4, 2 were granted"),
        (70, 0, 18, "needs 18 pages and this group has 16"),
    ],
)
def test_impossible_prompts_are_refused(tokens: int, cached: int, pages: int, reason: str) -> None:
    scheduler = scheduler_of(1, PagePool(16, 4))
    good = request(1, prompt_of(tokens, 1))
    bad = type(good)(
        grant=1,
        receiver=RECEIVER,
        incarnation=1,
        tokens=good.tokens,
        cached=cached,
        target_pages=tuple(range(pages)),
        root=good.root,
    )
    with pytest.raises(PromptRefused, match=reason):
        scheduler.add(bad, 0.0)
    assert scheduler.idle


# --- flow ----------------------------------------------------------------------------------------


def test_no_more_steps_than_the_depth_wait_for_stage_0() -> None:
    scheduler = scheduler_of(2, PagePool(64, 4))
    scheduler.add(request(1, prompt_of(200, 1)), 0.0)
    first = planned(scheduler)
    planned(scheduler)
    assert scheduler.next_plan(0.0) is None
    scheduler.step_done(done(first, stage=1))
    assert scheduler.next_plan(0.0) is None
    scheduler.step_done(done(first, stage=0))
    assert scheduler.next_plan(0.0, may_compute=False) is None
    assert planned(scheduler).items


def test_stage_0_does_not_run_away_from_a_slow_stage() -> None:
    scheduler = scheduler_of(3, PagePool(200, 4))
    scheduler.add(request(1, prompt_of(800, 1)), 0.0)
    plans: list[StepPlan] = []
    while (plan := scheduler.next_plan(0.0)) is not None:
        plans.append(plan)
        scheduler.step_done(done(plan, stage=0))
        scheduler.step_done(done(plan, stage=1))
    assert len(plans) == 6
    scheduler.step_done(done(plans[0], stage=2))
    assert planned(scheduler).items


def test_blocks_can_be_matched_only_when_every_stage_has_computed_them() -> None:
    pool = PagePool(64, 4)
    scheduler = scheduler_of(2, pool)
    scheduler.add(request(1, prompt_of(4, 1)), 0.0)
    plan = planned(scheduler)
    scheduler.step_done(done(plan, stage=0))
    assert pool.snapshot() == []
    scheduler.step_done(done(plan, stage=1))
    assert len(pool.snapshot()) == 1


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    sim = GroupSimulation(3, 2, 200, 4)
    stem = prompt_of(64, 1)
    for grant in range(5):
        sim.add(request(grant, stem + prompt_of(6, grant + 2)))
    sim.run()
    assert sim.planned == 64 + 5 * 6


def test_a_revoked_request_is_released_and_its_blocks_are_not_cached() -> None:
    pool = PagePool(64, 4)
    scheduler = scheduler_of(1, pool)
    scheduler.add(request(1, prompt_of(60, 1)), 0.0)
    scheduler.add(request(2, prompt_of(8, 2)), 0.0)
    plan = planned(scheduler)
    assert scheduler.revoke(RECEIVER, 1)
    assert not scheduler.revoke(RECEIVER, 1)
    assert not scheduler.revoke("other", 2)
    scheduler.step_done(done(plan))
    key = next(a.key for a in plan.admit if a.grant == 1)
    assert key in planned(scheduler).release
    scheduler.released(0, 0, [0, 1])
    assert (pool.counts().cached, pool.counts().resident) == (2, 0)
    assert scheduler.fault(0, key, "late") is None


def test_a_lost_receiver_loses_its_requests_and_no_other() -> None:
    scheduler = scheduler_of(1, PagePool(64, 4))
    scheduler.add(request(1, prompt_of(60, 1), incarnation=1), 0.0)
    planned(scheduler)
    scheduler.add(request(2, prompt_of(60, 2), incarnation=2), 0.0)
    scheduler.add(request(3, prompt_of(60, 3), receiver="e/1"), 0.0)
    assert scheduler.drop_receiver(RECEIVER, before=2) == [1]
    assert scheduler.drop_receiver(RECEIVER) == [2]
    assert not scheduler.idle


def test_a_fault_is_told_once_and_names_the_receiver() -> None:
    scheduler = scheduler_of(1, PagePool(64, 4))
    scheduler.add(request(5, prompt_of(60, 1)), 0.0)
    planned(scheduler)
    failed = scheduler.fault(0, 0, "its link is down")
    assert failed is not None
    assert (failed.receiver, failed.grant, failed.message) == (RECEIVER, 5, "its link is down")
    assert scheduler.fault(0, 0, "again") is None
    assert scheduler.fault(1, 0, "another epoch") is None
    assert scheduler.fault(0, 99, "unknown") is None


def test_a_new_epoch_fails_what_runs_and_keeps_what_waits() -> None:
    pool = PagePool(16, 4)
    scheduler = scheduler_of(2, pool)
    scheduler.add(request(1, prompt_of(60, 1)), 0.0)
    old = planned(scheduler)
    scheduler.add(request(2, prompt_of(60, 2)), 0.0)
    assert [f.grant for f in scheduler.new_epoch(3, "stage 1 is gone")] == [1]
    assert pool.counts().resident == 0
    plan = planned(scheduler)
    assert (plan.epoch, plan.admit[0].grant) == (3, 2)
    # What the old epoch still says is not taken for this one's.
    scheduler.step_done(done(old))
    assert pool.snapshot() == []


def test_a_smaller_pool_fails_what_does_not_fit_any_more() -> None:
    scheduler = scheduler_of(2, PagePool(16, 4))
    scheduler.add(request(1, prompt_of(60, 1)), 0.0)
    scheduler.add(request(2, prompt_of(20, 2)), 0.0)
    failed = scheduler.new_epoch(1, "stage 1 came back smaller", PagePool(8, 4))
    assert [(f.grant, f.message) for f in failed] == [(1, "the prompt does not fit into 8 pages")]
    assert planned(scheduler).admit[0].grant == 2


# --- fairness ------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = scheduler_of(2, PagePool(2000, 4), max_tokens=256)
    scheduler.add(request(1, prompt_of(4000, 1)), 0.0)
    first = planned(scheduler)
    scheduler.add(request(2, prompt_of(20, 2)), 0.0)
    second = planned(scheduler)
    assert [i.key for i in first.items] == [0]
    assert [(i.key, i.last) for i in second.items] == [(1, True), (0, False)]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    scheduler = scheduler_of(1, PagePool(4000, 4), max_tokens=64)
    scheduler.add(request(0, prompt_of(1000, 0)), 0.0)
    left = 1000
    for grant in range(1, 150):
        for i in range(4):
            scheduler.add(request(10 * grant + i, prompt_of(32, 10 * grant + i)), 0.0)
        plan = planned(scheduler)
        chunks = [Chunk(i.start, i.length) for i in plan.items]
        scheduler.step_done(done(plan, seconds=COST.step(chunks)))
        scheduler.released(0, 0, plan.release)
        old = [Chunk(i.start, i.length) for i in plan.items if i.key == 0]
        left -= sum(length for _, length in old)
        if not left:
            break
        # It has a claim to half of each step, to a page.
        assert COST.step(old) >= 0.5 * COST.step(chunks) - COST.work(old[0].start, old[0].start + 4)
    assert left == 0


def test_prompts_of_one_size_are_served_in_their_order() -> None:
    scheduler = scheduler_of(2, PagePool(2000, 4), max_tokens=256)
    for grant in range(5):
        scheduler.add(request(grant, prompt_of(500, grant)), 0.0)
    finished, _ = makespan(scheduler, 2, COST)
    assert sorted(finished, key=finished.__getitem__) == [0, 1, 2, 3, 4]


def test_small_prompts_pass_one_that_does_not_fit_but_not_for_ever() -> None:
    pool = PagePool(16, 4)
    scheduler = scheduler_of(1, pool, PrefillSettings(bypass_seconds=5.0), max_tokens=8)
    scheduler.add(request(1, prompt_of(40, 1)), 0.0)
    planned(scheduler)
    scheduler.add(request(2, prompt_of(36, 2)), 1.0)
    scheduler.add(request(3, prompt_of(8, 3)), 1.0)
    assert [a.grant for a in planned(scheduler, 1.0).admit] == [3]
    scheduler.add(request(4, prompt_of(8, 4)), 2.0)
    for step in range(2):
        scheduler.step_done(
            StepDone(epoch=0, step=step, stage=0, compute_seconds=0.01, wait_seconds=0.0)
        )
    assert planned(scheduler, 6.0).admit == ()


def test_active_requests_are_bounded() -> None:
    scheduler = scheduler_of(1, PagePool(99, 4), PrefillSettings(max_active=2), max_tokens=8)
    for grant in range(4):
        scheduler.add(request(grant, prompt_of(12, grant)), 0.0)
    assert len(planned(scheduler).admit) == 2
    load = scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens) == (2, 2, 48 - 8)


# --- speed ---------------------------------------------------------------------------------------


def long_prompts(count: int, **chunks: object) -> tuple[dict[int, float], list[StepPlan]]:
    """128K tokens of 7 s work each, c = 10 ms, eight stages."""
    n = 131072
    cost = Cost(c=0.01, gamma=0.0, b=3.5 / n, a=3.5 / n / n)
    options = ChunkSettings(**({"max_tokens": 32768} | chunks))  # type: ignore[arg-type]
    pool = PagePool(2048 * count, 64)
    scheduler = PrefillScheduler(
        8, pool, ChunkPlanner(8, 64, options), costs=[CostModel(cost) for _ in range(8)]
    )
    for grant in range(count):
        tokens = array("i", range(grant, grant + n))
        scheduler.add(request(grant, tokens, page_size=64), 0.0)
    finished, plans = makespan(scheduler, 8, cost)
    assert scheduler.idle
    assert pool.counts().resident == 0
    return finished, plans


def test_one_long_prompt_is_done_within_a_percent_of_the_bound() -> None:
    finished, plans = long_prompts(1)
    bound = (math.sqrt(7) + math.sqrt(7 * 0.01)) ** 2
    assert bound <= finished[0] <= 1.01 * bound
    assert 65 <= sum(1 for plan in plans if plan.items) <= 75


def test_prompts_back_to_back_are_cut_into_larger_chunks() -> None:
    finished, plans = long_prompts(4)
    # All four cost 28 s of work, and one bubble.
    bound = (math.sqrt(28) + math.sqrt(7 * 0.01)) ** 2
    assert bound <= max(finished.values()) <= 1.03 * bound
    assert sum(1 for plan in plans if plan.items) < 4 * 60


def test_fixed_chunks_are_fixed() -> None:
    _, plans = long_prompts(1, mode="fixed", fixed_tokens=6000)
    lengths = [item.length for plan in plans for item in plan.items]
    assert set(lengths[:-1]) == {5952}


def test_steps_are_learned_from() -> None:
    pool = PagePool(2000, 4)
    planner = ChunkPlanner(2, 4, ChunkSettings(max_tokens=256))
    scheduler = PrefillScheduler(2, pool, planner)
    slow = Cost(c=0.02, gamma=0.0, b=2e-3, a=1e-6)
    for grant in range(4):
        scheduler.add(request(grant, prompt_of(900, grant)), 0.0)
    makespan(scheduler, 2, slow)
    learned = Cost.from_wire(scheduler.cost())
    assert learned.chunk(300, 256) == pytest.approx(slow.chunk(300, 256), rel=0.05)
    assert len(scheduler.stage_costs()) == 2


# --- everything at once --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 4),
    pool_pages=st.integers(12, 60),
    page_size=st.sampled_from([1, 2, 4]),
    fault_rate=st.sampled_from([0.0, 0.3]),
    revokes=st.sampled_from([0.0, 0.05]),
    epochs=st.sampled_from([0.0, 0.03]),
)
def test_receivers_get_the_right_kv_whatever_happens(
    seed: int,
    stages: int,
    pool_pages: int,
    page_size: int,
    fault_rate: float,
    revokes: float,
    epochs: float,
) -> None:
    """Shared prefixes, loads that fail, revocations and new epochs at any moment."""
    sim = GroupSimulation(seed, stages, pool_pages, page_size)
    generator = sim.random
    stems = [prompt_of(24, n) for n in range(3)]
    most = pool_pages * page_size
    for grant in range(generator.randrange(1, 16)):
        for _ in range(generator.randrange(4)):
            sim.turn(fault_rate)
            if generator.random() < revokes and sim.prompts:
                sim.revoke(generator.choice(sorted(sim.prompts)))
            if generator.random() < epochs:
                sim.new_epoch(replaced=generator.random() < 0.5)
        stem = generator.choice(stems)[: generator.randrange(25)]
        tokens = (stem + prompt_of(generator.randrange(1, 20), grant))[:most]
        cached = generator.choice([0, generator.randrange(len(tokens) + 1)])
        sim.add(request(grant, tokens, page_size=page_size, cached=cached))
    sim.run(fault_rate)
