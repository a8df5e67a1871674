"""Layers, and their halves, are divided so that the slowest stage is as fast as possible."""

from __future__ import annotations

import argparse
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.scheduler.layer_split import half_costs, layer_counts, split_layers


def sizes(ranges: list[tuple[float, float]]) -> list[float]:
    return [last - first for first, last in ranges]


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(28, 4, [7, 7, 7, 7]), (9, 4, [2, 2.5, 2, 2.5]), (5, 5, [1] * 5), (3, 1, [3])],
)
def test_equal_halves_are_split_evenly(layers: int, stages: int, expected: list[float]) -> None:
    ranges = split_layers([1.0, 1.0] * layers, stages)
    assert sorted(sizes(ranges)) == sorted(expected)
    assert [a for a, _ in ranges[1:]] == [b for _, b in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, layers)


def test_halves_balance_what_layers_cannot() -> None:
    """60 layers and next to nothing on eight stages: whole ones would leave some with 8."""
    halves = split_layers([1.0, 1.0] * 60 + [0.1, 0.0], 8)
    assert sizes(halves) == [7.5] * 7 + [8.5]
    assert split_layers([1.0, 0.0] * 16, 2)[0][1] in {7.5, 8}


def test_the_last_layer_costs_what_is_computed_of_it() -> None:
    costs = [4.0, 6.0] * 15 + [0.5, 0.0]
    assert split_layers(costs, 2) == [(0, 7.5), (7.5, 16)]


def test_embedding_counts_as_the_first_stage_s() -> None:
    assert split_layers([1.0, 1.0] * 12, 3, embed_cost=6.0) == [(0, 2), (2, 7), (7, 12)]


@given(
    costs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5),
    stages=st.integers(1, 5),
    embed=st.integers(0, 20),
)
def test_slowest_stage_is_as_fast_as_possible(
    costs: list[tuple[int, int]], stages: int, embed: int
) -> None:
    stages = min(stages, len(costs))
    halves = [float(half) for layer in costs for half in layer]

    def slowest(bounds: tuple[int, ...]) -> float:
        edges = (0, *bounds, len(halves))
        if min(b - a for a, b in pairwise(edges)) < 2:
            return float("inf")  # a stage needs an attention
        loads = [sum(halves[a:b]) for a, b in pairwise(edges)]
        loads[0] += embed
        return max(loads)

    best = min(slowest(cuts) for cuts in combinations(range(1, len(halves)), stages - 1))
    ranges = split_layers(halves, stages, float(embed))
    assert slowest(tuple(round(2 * a) for a, _ in ranges[1:])) == best


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be divided among 4"):
        split_layers([1.0] * 6, 4)
    with pytest.raises(ValueError, match="two costs"):
        split_layers([1.0, 2.0, 3.0], 1)
    with pytest.raises(ValueError, match="none of them negative"):
        split_layers([1.0, -2.0], 1)


def test_layers_are_divided_anew_by_what_stages_measured() -> None:
    # Layers of the second half take twice as long, but of the last one nothing is computed: 8 and
    # 7 of twice the cost, 22 in all, 11 a stage.
    costs = half_costs([8, 8], [8.0, 14.0], [0.0, 0.0], 0.5)
    assert costs == [0.5] * 16 + [1.0] * 14 + [0.0, 0.0]
    assert split_layers(costs, 2) == [(0, 9.5), (9.5, 16)]


def test_what_grows_with_the_context_is_the_attention_s() -> None:
    costs = half_costs([2.5, 1.5], [5.0, 2.0], [9.0, 0.0], 0.25)
    # Stage 0: three attentions and two feed-forwards. Stage 1: one feed-forward, and the last
    # layer, of which nothing is counted.
    linear = 5.0 / (3 * 0.25 + 2 * 0.75)
    attention = 0.25 * linear + 3.0
    assert costs[:5] == pytest.approx([attention, 0.75 * linear] * 2 + [attention])
    assert costs[5:] == pytest.approx([2.0, *costs[6:]])
    assert costs[-2:] == [0.0, 0.0]


@pytest.mark.parametrize("counts", [[8], [8, 8.25], [8, 8.5], [15.5, 0.5]])
def test_counts_that_are_no_division_are_refused(counts: list[float]) -> None:
    with pytest.raises(ValueError, match="layers"):
        half_costs(counts, [1.0, 1.0], [0.0, 0.0], 0.25)


def test_layers_are_read_from_a_command_line() -> None:
    assert layer_counts("9,9,8") == (9, 9, 8)
    assert layer_counts("8.5,7.5,1024") == (8.5, 7.5, 1024)
    for wrong in ("", "8,", "0.5,15.5", "8.25,7.75", "-8,24", "1025", "nan", "1e1", "8 8"):
        with pytest.raises(argparse.ArgumentTypeError, match="in halves and at least one a stage"):
            layer_counts(wrong)
