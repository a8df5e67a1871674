from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from penstock_router.policy import (
    Choice,
    DecodeCandidate,
    Demand,
    GroupCandidate,
    choose,
    prefill_seconds,
)
from penstock_wire.messages import CostCoefficients, Load

COST = CostCoefficients(c=0.01, gamma=1e-6, b=1e-4, a=1e-9)
DEMAND = Demand(prompt_tokens=1000, max_output=100)


def decode(name: str = "d0", **changes: Any) -> DecodeCandidate:
    load = Load(
        state="ready",
        pages_free=1000,
        pages_total=1000,
        cost=COST,
        step_seconds=0.02,
        step_seconds_per_request=0.001,
        groups_ready=("g0", "g1"),
    )
    fields = set(Load.__struct_fields__)
    load = structs.replace(load, **{k: v for k, v in changes.items() if k in fields})
    rest = {k: v for k, v in changes.items() if k not in fields}
    base = DecodeCandidate(name=name, load=load, kv_layout="x", model_digest="m", page_size=16)
    return replace(base, **rest)


def group(name: str = "g0", **changes: Any) -> GroupCandidate:
    load = Load(state="ready", cost=COST, stages=2)
    fields = set(Load.__struct_fields__)
    load = structs.replace(load, **{k: v for k, v in changes.items() if k in fields})
    rest = {k: v for k, v in changes.items() if k not in fields}
    return replace(GroupCandidate(name=name, load=load, kv_layout="x", model_digest="m"), **rest)


def pick(
    decodes: list[DecodeCandidate],
    groups: list[GroupCandidate] | None = None,
    *,
    demand: Demand = DEMAND,
    require_prefill: bool = False,
    seed: int = 0,
) -> Choice | None:
    return choose(
        demand,
        decodes,
        groups or [],
        require_prefill=require_prefill,
        rng=random.Random(seed),
    )


def chosen(decodes: list[DecodeCandidate], groups: list[GroupCandidate] | None = None) -> str:
    choice = pick(decodes, groups)
    assert choice is not None
    return f"{choice.decode}/{choice.group}"


def test_a_cached_prefix_attracts() -> None:
    assert chosen([decode("d0"), decode("d1", cached_tokens=960)]) == "d1/"
    groups = [group("g0"), group("g1", cached_tokens=960)]
    assert chosen([decode()], groups) == "d0/g1"


def test_a_queue_outweighs_a_prefix() -> None:
    busy = decode("d1", cached_tokens=960, queued_seconds=5.0)
    assert chosen([decode("d0"), busy]) == "d0/"
    assert chosen([decode()], [group("g0"), group("g1", queued_seconds=3.0)]) == "d0/g0"


def test_what_was_just_routed_counts() -> None:
    assert chosen([decode("d0", routed_seconds=1.0), decode("d1")]) == "d1/"
    assert chosen([decode("d0", routed=50), decode("d1")]) == "d1/"
    assert chosen([decode()], [group("g0", routed_seconds=1.0), group("g1")]) == "d0/g1"


def test_no_room_for_the_kv_costs_time() -> None:
    assert chosen([decode("d0", pages_free=10), decode("d1", queued_seconds=0.1)]) == "d1/"
    assert chosen([decode("d0", routed_pages=990), decode("d1", queued_seconds=0.1)]) == "d1/"


def test_a_slow_decode_worker_is_left_to_the_others() -> None:
    assert chosen([decode("d0", step_seconds=0.2), decode("d1")]) == "d1/"


def test_a_worker_that_never_decoded_is_taken_for_as_fast_as_its_colleagues() -> None:
    fresh = decode("d1", step_seconds=0.0)
    for seed in range(20):
        choice = pick(
            [decode("d0", cached_tokens=960), fresh], [group(cached_tokens=960)], seed=seed
        )
        assert choice is not None
        assert choice.decode == "d0"
    assert chosen([decode("d0", step_seconds=0.2), decode("d2"), fresh]) != "d0/"


def test_ties_go_to_the_worker_that_has_the_prefix() -> None:
    """The group's cache saves the computing for both, but one of them has the KV already."""
    decodes = [decode("d0"), decode("d1", cached_tokens=480), decode("d2", cached_tokens=960)]
    for seed in range(20):
        choice = pick(decodes, [group(cached_tokens=960)], seed=seed)
        assert choice is not None
        assert choice.decode == "d2"
    decodes[2] = decode("d2", cached_tokens=960, routed=50)
    choice = pick(decodes, [group(cached_tokens=960)])
    assert choice is not None
    assert choice.decode == "d1", "affinity breaks ties only"


@pytest.mark.parametrize(
    "bad",
    [
        {"state": "draining"},
        {"state": "starting"},
        {"pages_total": 10},
    ],
)
def test_workers_that_cannot_take_it_are_no_candidates(bad: dict[str, Any]) -> None:
    assert pick([decode(**bad)]) is None


@pytest.mark.parametrize(
    "bad",
    [{"kv_layout": "y"}, {"model_digest": "n"}, {"state": "draining"}, {"name": "g9"}],
)
def test_groups_that_do_not_fit_are_never_paired(bad: dict[str, Any]) -> None:
    other = replace(group(), name=bad["name"]) if "name" in bad else group(**bad)
    assert pick([decode()], [other], require_prefill=True) is None
    assert chosen([decode()], [other]) == "d0/"


def test_a_ready_group_is_used_even_if_not_required() -> None:
    assert chosen([decode()], [group()]) == "d0/g0"


def test_ties_are_broken_evenly() -> None:
    decodes = [decode(f"d{n}") for n in range(4)]
    picks = [pick(decodes, seed=seed) for seed in range(400)]
    counts = Counter(choice.decode for choice in picks if choice)
    assert set(counts) == {"d0", "d1", "d2", "d3"}
    assert min(counts.values()) > 60


def test_a_colleague_stands_in_for_an_unknown_cost() -> None:
    fresh = decode("d1", cost=None)
    choice = pick([fresh, decode("d0", queued_seconds=9.0)])
    assert choice is not None
    assert choice.decode == "d1"
    assert choice.prefill_seconds == prefill_seconds(COST, 1, 0, 999)


def test_the_pipeline_formula_is_the_best_over_all_chunk_counts() -> None:
    cost = CostCoefficients(c=0.01, gamma=0.0, b=7e-4, a=0.0)
    work = 7.0
    best = min((work + m * 0.01) * (1 + 7 / m) for m in range(1, 500))
    assert prefill_seconds(cost, 8, 0, 10_000) == pytest.approx(best, rel=1e-3)
    assert prefill_seconds(cost, 1, 0, 10_000) == pytest.approx(7.01)
    assert prefill_seconds(cost, 4, 0, 1) == pytest.approx(4 * 0.0107)
    assert prefill_seconds(cost, 4, 100, 0) == 0.0


@settings(max_examples=100)
@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 8), st.integers(1, 500))
def test_more_new_tokens_never_take_less_time(
    cached: int, new: int, stages: int, more: int
) -> None:
    shorter = prefill_seconds(COST, stages, cached, new)
    assert 0 < shorter <= prefill_seconds(COST, stages, cached, new + more) + 1e-12


LOADS = st.fixed_dictionaries(
    {
        "queued_seconds": st.floats(0, 10),
        "cached_tokens": st.integers(0, 2000),
        "pages_free": st.integers(0, 1000),
        "step_seconds": st.floats(0.001, 0.5),
        "routed": st.integers(0, 20),
        "state": st.sampled_from(["ready", "draining"]),
    }
)


@settings(max_examples=100)
@given(st.lists(LOADS, max_size=5), st.integers(1, 2000), st.integers(0, 100))
def test_the_choice_is_valid_and_within_a_tie_of_the_best(
    loads: list[dict[str, Any]], prompt: int, seed: int
) -> None:
    decodes = [decode(f"d{n}", **load) for n, load in enumerate(loads)]
    demand = Demand(prompt_tokens=prompt, max_output=10)
    choice = pick(decodes, demand=demand, seed=seed)
    ready = [d for d in decodes if d.load.state == "ready"]
    assert (choice is None) == (not ready)
    if choice is None:
        return
    assert choice.decode in {d.name for d in ready}
    assert choice.cached_tokens < prompt
    assert choice.pages >= 0
    alone = [pick([d], demand=demand) for d in ready]
    best = min(each.cost for each in alone if each)
    assert choice.cost <= best * 1.02 + 1e-5
