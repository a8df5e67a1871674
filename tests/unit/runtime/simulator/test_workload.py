"""Arrivals: drawn, and read from a trace file."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.simulator.group import ROOT
from penstock_runtime.simulator.workload import (
    TRACE_BLOCK,
    Arrival,
    PoissonLoad,
    TraceInvalid,
    read_trace,
    scale_rate,
)
from penstock_wire.blocks import block_hashes
from penstock_wire.messages import pack_tokens

SAMPLE = Path(__file__).parent / "sample_trace.jsonl"


def test_poisson_arrivals_have_their_rate_and_means() -> None:
    load = PoissonLoad(
        rate=5.0, requests=4000, input_tokens=3000, output_tokens=100, spread=0.5, seed=3
    )
    arrivals = load.arrivals()
    assert arrivals[0].time == 0
    times = [a.time for a in arrivals]
    assert times == sorted(times)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.06)
    # Exponential: the standard deviation equals the mean.
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.mean(a.input_tokens for a in arrivals) == pytest.approx(3000, rel=0.05)
    assert statistics.mean(a.output_tokens for a in arrivals) == pytest.approx(100, rel=0.05)
    assert load.arrivals() == arrivals
    assert {
        a.input_tokens
        for a in PoissonLoad(rate=1, requests=5, input_tokens=70, output_tokens=1).arrivals()
    } == {70}


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"requests": 0}, {"spread": 9.0}])
def test_impossible_loads(wrong: dict[str, float]) -> None:
    chosen = {"rate": 1.0, "requests": 1, "input_tokens": 1.0, "output_tokens": 1.0} | wrong
    with pytest.raises(ValueError, match=r"above zero|spread"):
        PoissonLoad(**chosen)  # type: ignore[arg-type]


def test_a_trace_file_is_read() -> None:
    arrivals = read_trace(SAMPLE)
    assert len(arrivals) == 24
    assert arrivals[0].time == 0
    assert arrivals[1].time == pytest.approx(0.4)
    assert arrivals[1] == Arrival(arrivals[1].time, 2048, 40, (1, 2, 3, 5))
    assert read_trace(SAMPLE, limit=3) == arrivals[:3]
    twice = scale_rate(arrivals, 2.0)
    assert twice[-1].time == arrivals[-1].time / 2
    assert [a.blocks for a in twice] == [a.blocks for a in arrivals]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "line 2"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "line 2"),
        ('{"timestamp": 1, "output_length": 1}', "input_length"),
    ],
)
def test_lines_that_are_no_request(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    good = '{"timestamp": 1, "input_length": 1, "output_length": 0, "hash_ids": []}'
    file.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(TraceInvalid, match=message):
        read_trace(file)
    file.write_text("\n\n", encoding="utf-8")
    with pytest.raises(TraceInvalid, match="no request"):
        read_trace(file)


@given(
    first=st.lists(st.integers(0, 6), max_size=5),
    second=st.lists(st.integers(0, 6), max_size=5),
    lengths=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    page=st.sampled_from([64, 512]),
)
def test_prompts_have_in_common_what_their_blocks_say(
    first: list[int], second: list[int], lengths: tuple[int, int], page: int
) -> None:
    one = Arrival(0.0, lengths[0], 1, tuple(first)).tokens(0)
    other = Arrival(0.0, lengths[1], 1, tuple(second)).tokens(1)
    assert (len(one), len(other)) == lengths
    hashes = [block_hashes(ROOT, pack_tokens(tokens), page) for tokens in (one, other)]
    common = _common(hashes[0], hashes[1]) * page
    alike = _common(first, second) * TRACE_BLOCK
    assert common == min(alike, *lengths) // page * page


def _common(left: list[object] | list[bytes] | list[int], right: list[bytes] | list[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
