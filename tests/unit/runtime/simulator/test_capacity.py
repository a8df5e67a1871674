"""Capacity planning: enough is found, and no more than that; caches count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock_runtime.scheduler.chunk_planner import ChunkSettings
from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.simulator.capacity import (
    GroupModel,
    NoCapacity,
    Targets,
    _least,
    percentile,
    plan_capacity,
    simulate_decode,
    simulate_prefill,
)
from penstock_runtime.simulator.decode import DecodeModel
from penstock_runtime.simulator.hardware import Hardware, Link, StageModel
from penstock_runtime.simulator.workload import Arrival, PoissonLoad, read_trace

COST = Cost(c=2e-3, gamma=0.0, b=1e-5, a=1e-10)
GROUP = GroupModel(
    costs=(COST, COST),
    chunks=ChunkSettings(max_tokens=2048),
    hardware=Hardware.uniform(2, StageModel(COST), kv=Link(1e9, 1e-3), kv_bytes=1000),
    page_size=64,
    kv_tokens=200_000,
)
DECODE = DecodeModel(step=0.01, request=2e-4, token=1e-8, max_batch=32, kv_tokens=500_000)
SAMPLE = Path(__file__).parent / "sample_trace.jsonl"


def load(rate: float, requests: int = 150) -> list[Arrival]:
    return PoissonLoad(
        rate=rate, requests=requests, input_tokens=4000, output_tokens=60, spread=0.3, seed=1
    ).arrivals()


def test_a_light_load_needs_one_of_each() -> None:
    found = plan_capacity(load(1.0), GROUP, DECODE, Targets(ttft=1.0, itl=0.05))
    assert (found[-1].groups, found[-1].workers) == (1, 1)
    assert found[-1].meets


def test_the_answer_meets_the_targets_and_one_less_does_not() -> None:
    targets = Targets(ttft=0.4, itl=0.0165, percent=95)
    arrivals = load(60.0)
    found = plan_capacity(arrivals, GROUP, DECODE, targets)
    best = found[-1]
    assert best.meets
    assert best.groups > 1
    assert best.workers > 1
    assert best.ttft <= targets.ttft
    assert best.itl <= targets.itl
    fewer = simulate_prefill(arrivals, GROUP, best.groups - 1)
    waits = [r - a.time for r, a in zip(fewer.ready, arrivals, strict=True)]
    assert percentile(waits, 95) + DECODE.seconds(1, 0) > targets.ttft
    prefill = simulate_prefill(arrivals, GROUP, best.groups)
    starved = simulate_decode(arrivals, prefill, DECODE, best.workers - 1)
    assert starved.gaps.percentile(95) > targets.itl or percentile(starved.ttft, 95) > targets.ttft
    assert not any(candidate.meets for candidate in found[:-1] if candidate.groups < best.groups)


def test_more_groups_are_not_slower_and_do_the_same_work() -> None:
    arrivals = load(20.0)
    outcomes = [simulate_prefill(arrivals, GROUP, n) for n in (1, 2, 4)]
    p95 = [
        percentile([r - a.time for r, a in zip(o.ready, arrivals, strict=True)], 95)
        for o in outcomes
    ]
    assert p95 == sorted(p95, reverse=True)
    assert all(o.utilisation <= 1 for o in outcomes)


def test_common_prefixes_are_computed_once_and_pull_requests_together() -> None:
    arrivals = read_trace(SAMPLE)
    alone = [replace(arrival, blocks=()) for arrival in arrivals]
    one, none = simulate_prefill(arrivals, GROUP, 1), simulate_prefill(alone, GROUP, 1)
    assert none.cached_tokens == 0
    # What can be cached at most: blocks that an earlier request has, from the start on.
    seen: set[int] = set()
    most = 0
    for arrival in arrivals:
        for block in arrival.blocks:
            if block not in seen:
                break
            most += 512
        seen.update(arrival.blocks)
    assert 0.7 * most < one.cached_tokens <= most
    assert sum(one.ready) < sum(none.ready)
    # Two groups: a request goes where its prefix is, unless that group has a queue.
    assert simulate_prefill(arrivals, GROUP, 2).cached_tokens > 0.5 * one.cached_tokens


def test_a_small_memory_keeps_few_prefixes() -> None:
    arrivals = read_trace(SAMPLE)
    small = replace(GROUP, kv_tokens=4096 + 512)
    assert (
        simulate_prefill(arrivals, small, 1).cached_tokens
        < simulate_prefill(arrivals, GROUP, 1).cached_tokens
    )


def test_the_time_to_the_first_token_has_all_its_parts() -> None:
    arrivals = [Arrival(0.0, 2048, 3)]
    prefill = simulate_prefill(arrivals, GROUP, 1)
    decode = simulate_decode(arrivals, prefill, DECODE, 1)
    step = DECODE.seconds(1, 2048)
    assert prefill.ready[0] > COST.chunk(0, 2048) + 1e-3
    assert decode.ttft == [pytest.approx(prefill.ready[0] + step)]


def test_impossible_targets_are_told_with_their_reason() -> None:
    with pytest.raises(NoCapacity, match="loosen the targets"):
        plan_capacity(load(1.0, 5), GROUP, DECODE, Targets(ttft=1e-3, itl=1.0), most=2)
    with pytest.raises(NoCapacity, match="loosen the targets"):
        plan_capacity(load(1.0, 5), GROUP, DECODE, Targets(ttft=9.0, itl=1e-3), most=2)
    with pytest.raises(NoCapacity, match="a group's"):
        plan_capacity([Arrival(0, 300_000, 1)], GROUP, DECODE, Targets(ttft=9, itl=9))
    with pytest.raises(NoCapacity, match="a decode worker's"):
        plan_capacity([Arrival(0, 1000, 600_000)], GROUP, DECODE, Targets(ttft=9, itl=9))
    with pytest.raises(ValueError, match="above zero"):
        Targets(ttft=0.0, itl=1.0)


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 13, 20])
def test_the_least_number_is_found(wanted: int) -> None:
    tried: list[int] = []

    def meets(number: int) -> bool:
        tried.append(number)
        return number >= wanted

    assert _least(meets, 1, 20) == wanted
    assert len(tried) <= 9
    assert _least(lambda _: False, 1, 20) is None
