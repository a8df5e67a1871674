"""Replayed decode steps give what eager ones give; capture is a function that runs again."""

from __future__ import annotations

import random
from array import array
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock_runtime.attention.base import Segment
from penstock_runtime.attention.flashinfer import FlashInferAttention
from penstock_runtime.engine.cuda_graphs import DecodeGraphs
from penstock_runtime.engine.graph_sizes import graph_sizes
from penstock_runtime.engine.runner import DecodeRunner
from penstock_runtime.engine.sampler import SamplingRow
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.fused import FlashInferKernels
from penstock_runtime.model.transformer import attention_shape
from penstock_runtime.scheduler.batch import Batch, BatchSegment
from penstock_wire.messages import Sampling
from tests.integration.system import checkpoint
from tests.unit.runtime import fake_flashinfer
from tests.unit.runtime.model.checkpoints import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from penstock_runtime.model.transformer import Transformer

CPU = torch.device("cpu")
PAGE, PAGES, MAX_BATCH, MAX_TOKENS = 4, 40, 6, 32


def rerun(function: Callable[[], None]) -> Callable[[], None]:
    """Stand in for a capture: warm up, capture, and replay by calling."""
    function()
    function()
    return function


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path: Path = checkpoint.make(tmp_path_factory.mktemp("model"))
    config = ModelConfig.from_directory(path)
    shape = attention_shape(config, torch.float32, CPU)
    model = whole_model(path, attention=FlashInferAttention(fake_flashinfer, shape, CPU))
    model.kernels = FlashInferKernels(fake_flashinfer)
    return model


def make_pool(model: Transformer) -> PoolTensor:
    layout = model.config.kv_layout(
        layers=(0, model.num_layers), page_size=PAGE, dtype=torch.float32
    )
    pool = PoolTensor(layout, PAGES, dtype=torch.float32, device=CPU)
    pool.tensor.normal_(generator=torch.Generator().manual_seed(7))
    return pool


def capture(model: Transformer, pool: PoolTensor, seen: list[tuple[int, int]]) -> DecodeGraphs:
    assert isinstance(model.attention, FlashInferAttention)
    return DecodeGraphs(
        model,
        model.attention,
        pool,
        sizes=graph_sizes(MAX_BATCH),
        max_tokens=MAX_TOKENS,
        capture=rerun,
        progress=lambda done, total: seen.append((done, total)),
    )


def batch_of(spans: list[tuple[int, int]], seed: int) -> tuple[Batch, list[SamplingRow]]:
    """Return a batch of (start, length) on pages of its own, and how its tokens are chosen."""
    rng = random.Random(seed)
    pages = rng.sample(range(PAGES - 1), PAGES - 1)
    segments, rows = [], []
    for number, (start, length) in enumerate(spans):
        count = -(-(start + length) // PAGE)
        taken, pages = tuple(pages[:count]), pages[count:]
        tokens = array("i", (rng.randrange(1, 200) for _ in range(length)))
        segments.append(BatchSegment(str(number), start, tokens, taken, number % 3 != 2, 0))
        if segments[-1].sample:
            sampling = Sampling(seed=number, temperature=0.7 * (number % 2))
            rows.append(SamplingRow(sampling, array("i", [1]), 1, 0))
    return Batch(tuple(segments)), rows


@given(
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=MAX_BATCH + 1),
    chunk=st.integers(0, 5),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@torch.inference_mode()
def test_a_replay_equals_the_eager_step(
    model: Transformer, starts: list[int], chunk: int, seed: int
) -> None:
    starts = starts[: 4 if chunk else None]
    spans = [(min(start, 14), 1) for start in starts] + ([(0, chunk)] if chunk else [])
    batch, rows = batch_of(spans, seed)
    pool, expected_pool = make_pool(model), make_pool(model)
    graphs = capture(model, pool, [])
    # Two batches one after the other: what the first left in the buffers must not matter.
    other = batch_of([(9, 1), (3, 1), (17, 1), (0, 1)], seed + 1)
    for one, its_rows in (other, (batch, rows)):
        with_graphs = DecodeRunner(model, pool, graphs=graphs).step(one, its_rows)
        eager = DecodeRunner(model, expected_pool).step(one, its_rows)
        assert [token.id for token in with_graphs] == [token.id for token in eager]
    torch.testing.assert_close(pool.tensor[:-1], expected_pool.tensor[:-1])


@torch.inference_mode()
def test_every_size_is_captured_with_progress(model: Transformer) -> None:
    seen: list[tuple[int, int]] = []
    pool = make_pool(model)
    before = pool.tensor.clone()
    capture(model, pool, seen)
    sizes = len(graph_sizes(MAX_BATCH))
    assert seen == [(done, sizes) for done in range(1, sizes + 1)]
    assert torch.equal(pool.tensor[:-1], before[:-1]), "capturing wrote to others' pages"


@torch.inference_mode()
def test_what_has_no_graph_runs_as_it_is(model: Transformer) -> None:
    pool = make_pool(model)
    graphs = capture(model, pool, [])
    segments = [Segment(start=0, length=3, pages=(0,))]
    assert graphs.replay(torch.zeros(3, dtype=torch.int64), segments) is None
