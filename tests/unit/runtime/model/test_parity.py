"""Our forward equals transformers', however the prompt is cut, paged and batched."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.attention.base import Segment, single_rows
from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.paged_cpu import PagedCpuAttention
from penstock_runtime.attention.reference import ReferenceAttention
from penstock_runtime.kernels import selection
from penstock_runtime.kernels.native import Kernels
from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model import linear
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.layers import WantedRows
from penstock_runtime.model.transformer import Transformer
from tests.unit.runtime.kernels.built import built_kernels

from .checkpoints import CONFIGS, MAX_TOKENS, PROMPTS, Reference, reference, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CPU = torch.device("cpu")
TOLERANCE = 1e-4
KERNELS = ["native", "torch"]


@pytest.fixture(autouse=True, scope="module")
def kernels_are_built():
    built_kernels()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: reference(CONFIGS[name], root / name))


def stages(path: Path, cuts: Sequence[float], **options) -> list[Transformer]:
    """Load a model as pipeline stages with borders at the layers `cuts`, or within some."""
    config = ModelConfig.from_directory(path)
    borders = [0, *cuts, config.layers]
    return [
        Transformer.load(
            path,
            config,
            layers=(first, last),
            embed=first == 0,
            head=last == config.layers,
            dtype=options.get("dtype", torch.float32),
            device=CPU,
            kernels=options.get("kernels", "torch"),
            attention=options.get("attention"),
        )
        for first, last in itertools.pairwise(borders)
    ]


class Sequences:
    """Sequences of one model with KV in a pool a stage, as far as they were computed."""

    def __init__(self, models: list[Transformer], page_size: int, count: int) -> None:
        self.models = models
        self.page_size = page_size
        pages = pages_for(MAX_TOKENS, page_size)
        shuffled = list(range(count * pages + 1))
        random.Random(page_size).shuffle(shuffled)
        self.pages = [shuffled[index * pages : (index + 1) * pages] for index in range(count)]
        self.done = [0] * count
        borders = [0]
        for model in models:
            # Whole layers, as many as have their attention here: so many are in its pages.
            borders.append(borders[-1] + model.num_layers)
        self.pools = [
            PoolTensor(
                model.config.kv_layout(layers=cut, page_size=page_size, dtype=model.dtype),
                len(shuffled),
                dtype=model.dtype,
                device=CPU,
            ).tensor
            for model, cut in zip(models, itertools.pairwise(borders), strict=True)
        ]
        for pool in self.pools:
            pool.normal_(0, 50)  # what other requests left behind

    def step(
        self, parts: list[tuple[int, torch.Tensor]], rows: list[int] | None = None
    ) -> torch.Tensor:
        """Compute the next tokens of some sequences together; return their logits.

        All of them, or those of some rows of the batch.
        """
        segments, positions = [], []
        for index, tokens in parts:
            start, length = self.done[index], len(tokens)
            used = pages_for(start + length, self.page_size)
            segments.append(Segment(start=start, length=length, pages=self.pages[index][:used]))
            positions.append(torch.arange(start, start + length))
            self.done[index] += length
        position = torch.cat(positions)
        with torch.inference_mode():
            hidden = self.models[0].embed(torch.cat([tokens for _, tokens in parts]))
            for model, pool in zip(self.models, self.pools, strict=True):
                attention, wanted = model.attention, None
                plan = attention.plan(segments, self.page_size, CPU)
                if rows is not None and model is self.models[-1]:
                    wanted = WantedRows.of(segments, rows, attention, self.page_size, CPU)
                hidden = model.forward(hidden, position, plan, pool, wanted)
            return self.models[-1].logits(hidden)


def prefill(sequences: Sequences, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Return the logits of one prompt, computed in chunks of the given lengths, repeated."""
    logits, start, turn = [], 0, 0
    while start < len(tokens):
        part = tokens[start : start + chunks[turn % len(chunks)]]
        logits.append(sequences.step([(0, part)]))
        start, turn = start + len(part), turn + 1
    return torch.cat(logits)


def walk(
    sequences: Sequences,
    steps: Sequence[dict[int, int]],
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> Iterator[tuple[list[tuple[int, torch.Tensor]], torch.Tensor]]:
    """Yield what `Sequences.step` takes for each step, and the logits of all its rows.

    A step names sequences and how many of their tokens come next; those that have ended are left
    out, and so are steps with nobody left. The caller computes each before asking for the next.
    """
    for step in steps:
        windows = [
            (index, slice(sequences.done[index], sequences.done[index] + length))
            for index, length in step.items()
        ]
        windows = [(index, window) for index, window in windows if len(tokens[index, window])]
        if windows:
            yield (
                [(index, tokens[index, window]) for index, window in windows],
                torch.cat([logits[index, window] for index, window in windows]),
            )


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_equals_transformers(name, kernels, references):
    known: Reference = references(name)
    sequences = Sequences(stages(known.path, [2], kernels=kernels), page_size=8, count=1)
    logits = prefill(sequences, known.tokens[0], [19, 1, 1, 24])
    assert_equal(logits, known.logits[0])
    own_rounding = (known.logits - known.exact).abs().max()
    assert own_rounding < TOLERANCE / 3, "the model is too badly conditioned to compare with"


@given(
    name=st.sampled_from(["llama", "llama-mha", "mistral", "qwen2-yarn", "qwen3"]),
    page_size=st.sampled_from([1, 2, 3, 8, 16, 32, 128]),
    chunks=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=4),
    cuts=st.lists(st.sampled_from([1, 1.5, 2, 2.5, 3]), max_size=3).map(sorted),
    attention=st.one_of(
        st.none(), st.builds(PagedCpuAttention, st.sampled_from([1, 16, 40, 4096]))
    ),
    kernels=st.sampled_from(KERNELS),
)
@settings(max_examples=20, deadline=None)
def test_chunks_pages_and_stages_do_not_matter(
    references, name, page_size, chunks, cuts, attention, kernels
):
    """The kernels' operators and attention backends work with each other's."""
    cuts = [cut for i, cut in enumerate(cuts) if i == 0 or cut - cuts[i - 1] >= 1]
    known: Reference = references(name)
    models = stages(known.path, cuts, attention=attention, kernels=kernels)
    sequences = Sequences(models, page_size, count=1)
    tokens, logits = known.tokens[1, :64], known.logits[1, :64]
    assert_equal(prefill(sequences, tokens, chunks), logits)


batches = st.lists(
    st.dictionaries(
        st.integers(0, PROMPTS - 1),
        st.one_of(st.just(1), st.integers(1, 40)),
        min_size=1,
        max_size=PROMPTS,
    ),
    min_size=1,
    max_size=8,
)


@given(
    name=st.sampled_from(["llama", "qwen2", "qwen3-yarn"]),
    page_size=st.sampled_from([2, 8, 32]),
    steps=batches,
    attention=st.one_of(
        st.none(),
        st.builds(PagedCpuAttention, st.sampled_from([1, 64, 4096])),
        st.builds(DenseAttention),
    ),
    kernels=st.sampled_from(KERNELS),
)
@settings(max_examples=30, deadline=None)
def test_sequences_of_a_batch_do_not_touch_each_other(
    references, name, page_size, steps, attention, kernels
):
    known: Reference = references(name)
    models = stages(known.path, [], attention=attention, kernels=kernels)
    sequences = Sequences(models, page_size, count=PROMPTS)
    for parts, expected in walk(sequences, steps, known.tokens, known.logits):
        assert_equal(sequences.step(parts), expected)


@given(
    name=st.sampled_from(["llama", "qwen2", "qwen3-yarn"]),
    page_size=st.sampled_from([2, 8, 32]),
    steps=batches,
    cuts=st.sampled_from([[], [2], [2.5]]),
    attention=st.one_of(
        st.none(),
        st.builds(PagedCpuAttention, st.sampled_from([1, 64, 4096])),
        st.builds(DenseAttention),
        st.builds(ReferenceAttention),
    ),
    kernels=st.sampled_from(KERNELS),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_of_the_last_layer_only_what_is_wanted_is_computed(
    references, name, page_size, steps, cuts, attention, kernels, data
):
    """The logits that are wanted, and all keys and values: the steps that follow see those."""
    known: Reference = references(name)
    models = stages(known.path, cuts, attention=attention, kernels=kernels)
    sequences = Sequences(models, page_size, count=PROMPTS)
    for parts, expected in walk(sequences, steps, known.tokens, known.logits):
        rows = sorted(data.draw(st.sets(st.integers(0, len(expected) - 1), max_size=4)))
        assert_equal(sequences.step(parts, rows), expected[rows])


def test_rows_that_are_wanted_of_a_batch():
    segments = [
        Segment(start=7, length=1, pages=[0]),
        Segment(start=2, length=4, pages=[1]),
        Segment(start=0, length=2, pages=[2]),
    ]
    found = single_rows(segments, [0, 2, 4, 6])
    assert [(s.start, s.length, s.pages) for s in found] == [
        (7, 1, [0]),
        (3, 1, [1]),
        (5, 1, [1]),
        (1, 1, [2]),
    ]
    assert single_rows(segments, []) == []
    for wrong in ([7], [3, 0], [-1]):
        with pytest.raises(ValueError, match="do not rise within the batch"):
            single_rows(segments, wrong)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-llama3", "qwen3"])
def test_half_precision_stays_close_to_float32(
    name, dtype, kernels, narrow, references, monkeypatch
):
    """Computed in the dtype itself, and widened as on CPUs that lack instructions for it."""
    monkeypatch.setattr(linear, "_multiplies_natively", lambda _: narrow)
    monkeypatch.setattr(selection, "Kernels", lambda: _kernels(narrow))
    known: Reference = references(name)
    models = stages(known.path, [2], dtype=dtype, kernels=kernels)
    sequences = Sequences(models, page_size=8, count=1)
    logits = prefill(sequences, known.tokens[0], [40, 1])
    error = (logits - known.logits[0]).std() / known.logits[0].std()
    assert logits.dtype == torch.float32
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def _kernels(narrow: bool) -> Kernels:
    """The kernels, as if the processor multiplied pairs of bfloat16 or not: else it is emulated."""
    kernels = Kernels()
    kernels.multiplies_bfloat16 = narrow
    return kernels


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_a_model_is_cut_changes_no_bit(dtype, kernels, references):
    known: Reference = references("qwen3")
    found = []
    divisions: list[list[float]] = [[], [2], [1.5], [1, 2.5], [1.5, 3]]
    for cuts in divisions:
        models = stages(known.path, cuts, dtype=dtype, kernels=kernels)
        sequences = Sequences(models, page_size=8, count=1)
        found.append(prefill(sequences, known.tokens[0], [19, 1, 24]))
    for logits in found[1:]:
        assert torch.equal(logits, found[0])


def test_a_sharded_checkpoint_gives_the_same_logits(references, tmp_path):
    known: Reference = references("qwen2")
    save(CONFIGS["qwen2"], tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sequences = Sequences(stages(tmp_path, [1]), page_size=16, count=1)
    assert_equal(prefill(sequences, known.tokens[0], [33]), known.logits[0])


def test_forward_leaves_its_input_as_it_was(references):
    known: Reference = references("llama")
    (model,) = stages(known.path, [])
    sequences = Sequences([model], page_size=8, count=1)
    with torch.inference_mode():
        hidden = model.embed(known.tokens[0, :5])
        before = hidden.clone()
        plan = model.attention.plan([Segment(start=0, length=5, pages=[0])], 8, CPU)
        model.forward(hidden, torch.arange(5), plan, sequences.pools[0])
    assert torch.equal(hidden, before)
