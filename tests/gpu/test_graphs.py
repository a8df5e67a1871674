"""A replayed decode step gives what the same step gives launched kernel by kernel."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.cuda_graphs import DecodeGraphs, cuda_capture
from penstock_runtime.engine.graph_sizes import graph_sizes
from penstock_runtime.engine.runner import DecodeRunner
from penstock_runtime.engine.sampler import SamplingRow
from penstock_runtime.engine.streams import streams_of
from penstock_runtime.scheduler.batch import Batch, BatchSegment
from penstock_runtime.worker.prepare import capture_graphs, warm_up
from penstock_wire.messages import Sampling
from tests.gpu.models import CUDA, PAGE, PAGES, Loaded, save

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

MAX_BATCH, MAX_TOKENS = 12, 256


def prefill(loaded: Loaded, pages: list[list[int]], lengths: list[int]) -> None:
    for own, length in zip(pages, lengths, strict=True):
        loaded.step([(torch.arange(length) % 280, 0, own)])


def decode_batch(pages: list[list[int]], lengths: list[int], step: int) -> Batch:
    segments = []
    for number, (own, length) in enumerate(zip(pages, lengths, strict=True)):
        start = length + step
        taken = tuple(own[: start // PAGE + 1])
        tokens = array("i", [(7 * number + step) % 280])
        segments.append(BatchSegment(str(number), start, tokens, taken, True, step))
    return Batch(tuple(segments))


@torch.inference_mode()
def test_replays_equal_eager_steps(tmp_path: Path) -> None:
    path = save(tmp_path)
    replayed, eager = (Loaded(path, torch.bfloat16, CUDA) for _ in range(2))
    seen: list[tuple[int, int]] = []
    graphs = capture_graphs(
        replayed.model,
        replayed.pool,
        max_batch=MAX_BATCH,
        max_tokens=MAX_TOKENS,
        capture=cuda_capture(CUDA),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert isinstance(graphs, DecodeGraphs)
    assert seen[-1] == (len(graph_sizes(MAX_BATCH)),) * 2
    for rows in (1, 2, 3, 5, 11, 12, 4):
        lengths = [1 + 13 * i % 60 for i in range(rows)]
        pages = [[5 * i + j for j in range(5)] for i in range(rows)]
        assert pages[-1][-1] < PAGES - 1
        for loaded in (replayed, eager):
            prefill(loaded, pages, lengths)
        for step in range(3):
            batch = decode_batch(pages, lengths, step)
            sampling = [
                SamplingRow(Sampling(seed=i, temperature=0), array("i", [1]), 1, 0)
                for i in range(rows)
            ]
            ours = DecodeRunner(replayed.model, replayed.pool, graphs=graphs).step(batch, sampling)
            theirs = DecodeRunner(eager.model, eager.pool).step(batch, sampling)
            agree = sum(a.id == b.id for a, b in zip(ours, theirs, strict=True))
            # Rows of another batch size may round differently, so a near tie may fall elsewhere.
            assert agree >= rows - 1
        ours_kv, theirs_kv = (each.pool.tensor[:-1].float() for each in (replayed, eager))
        assert (ours_kv - theirs_kv).abs().max() < 0.05 * theirs_kv.abs().max()


async def test_a_captured_step_runs_on_the_compute_thread(tmp_path: Path) -> None:
    loaded = Loaded(save(tmp_path), torch.bfloat16, CUDA)
    compute = Compute(1, streams_of(CUDA))
    await compute.run(warm_up, loaded.model, loaded.pool, tokens=200, embed=True, head=True)
    graphs = await compute.run(
        capture_graphs,
        loaded.model,
        loaded.pool,
        max_batch=2,
        max_tokens=64,
        capture=cuda_capture(CUDA),
        progress=lambda _done, _total: None,
    )
    runner = DecodeRunner(loaded.model, loaded.pool, graphs=graphs)
    batch = decode_batch([[0, 1]], [3], 0)
    rows = [SamplingRow(Sampling(seed=1, temperature=0), array("i", [1]), 1, 0)]
    assert len(await compute.run(runner.step, batch, rows)) == 1
    compute.close()
