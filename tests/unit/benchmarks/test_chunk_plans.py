from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import chunk_plans
import pytest
import torch
from common import Report
from emulated_stage import HIDDEN, PAGE, EmulatedRunner, kv_layout, wait_until

from penstock_runtime.attention.base import Segment
from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.simulator.hardware import StageModel
from penstock_runtime.transfer.page_ranges import Side, page_ranges

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

MODEL = StageModel(Cost(c=2e-3, gamma=1e-9, b=1e-6, a=1e-11), saturation=500.0)
SEGMENTS = [Segment(start=64, length=128, pages=()), Segment(start=0, length=32, pages=())]


def runner(jitter: float = 0.0, seed: int = 1) -> EmulatedRunner:
    return EmulatedRunner(MODEL, page_size=PAGE, jitter=jitter, seed=seed)


def test_a_step_takes_what_the_hardware_takes() -> None:
    assert runner().seconds(SEGMENTS) == MODEL.seconds([Chunk(64, 128), Chunk(0, 32)])


def test_jitter_is_relative_and_follows_from_the_seed() -> None:
    drawn = [
        runner(0.01, seed).seconds(SEGMENTS) / MODEL.seconds([Chunk(64, 128), Chunk(0, 32)])
        for seed in range(200)
    ]
    assert drawn == [
        runner(0.01, seed).seconds(SEGMENTS) / runner().seconds(SEGMENTS) for seed in range(200)
    ]
    assert all(0.94 < ratio < 1.06 for ratio in drawn)
    assert math.dist(drawn, [1.0] * 200) / math.sqrt(200) == pytest.approx(0.01, rel=0.2)


def test_a_step_is_never_short() -> None:
    emulated = runner()
    started = time.perf_counter()
    hidden = emulated.run(torch.zeros(160, dtype=torch.int64), SEGMENTS)
    assert time.perf_counter() - started >= emulated.seconds(SEGMENTS)
    assert hidden.shape == (160, HIDDEN)
    assert emulated.late_seconds > 0


def test_a_deadline_that_has_passed_is_told() -> None:
    assert wait_until(time.perf_counter() - 1) >= 1


def test_a_stage_writes_its_layer_of_the_receivers_pages() -> None:
    stage, receiver = kv_layout(2, 3), kv_layout(0, 4)
    ours, theirs = Side([(0, (0, 1))], (2, 3), [0, 1]), Side([(0, (0, 1))], (0, 4), [5, 6])
    local, remote = page_ranges(stage, (2, 3), ours, theirs)
    assert local.tolist() == [[i * stage.page_bytes, stage.page_bytes] for i in (0, 1)]
    assert remote.tolist() == [
        [page * receiver.page_bytes + 2 * stage.page_bytes, stage.page_bytes] for page in (5, 6)
    ]


@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("tokens", [32_768, 131_072])
def test_the_bound_is_that_of_equal_sizes_by_equal_times(stages: int, tokens: int) -> None:
    cost = Cost(c=5e-3, gamma=0.0, b=9e-6, a=3.3e-10)
    work = cost.work(0, tokens)
    equal_times = (math.sqrt(work) + math.sqrt((stages - 1) * cost.c)) ** 2

    def equal_sizes(size: int) -> float:
        times = [cost.chunk(s, min(size, tokens - s)) for s in range(0, tokens, size)]
        return sum(times) + (stages - 1) * max(times)

    best = min(equal_sizes(size) for size in range(PAGE, 8192, PAGE))
    assert best / equal_times == pytest.approx(chunk_plans.bound(cost, stages, tokens), rel=0.01)


def test_all_modes_have_the_same_largest_step() -> None:
    ways = chunk_plans.modes(options("--fixed", "1024", "4096"))
    assert list(ways) == ["adaptive", "fixed 1,024", "fixed 4,096"]
    assert {chunks.max_tokens for chunks in ways.values()} == {4096}


def options(*arguments: str) -> argparse.Namespace:
    return chunk_plans.parser().parse_args(arguments)


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    args = options(
        *("--stages", "2", "--prompt-tokens", "2048", "--warm-up", "2048", "--rounds", "2"),
        *("--fixed", "512", "1024", "--cost", "c=0.002,b=1e-6,a=1e-11", "--output", str(output)),
    )
    report = Report(output)
    samples = asyncio.run(chunk_plans.measure(args, report))
    rows = chunk_plans.rows_of(samples, args)
    assert [row.mode for row in rows] == ["adaptive", "fixed 512", "fixed 1,024"]
    assert [row.chunks for row in rows[1:]] == [4, 2]
    found = chunk_plans.verdict(samples, rows)
    assert found.ratio.samples == 2
    # A prompt takes at least what its first stage computes.
    assert all(sample["ttft"] > sample["compute_seconds"][0] for sample in samples)
    assert output.exists()
