"""A token's logits have the same bits however it is computed: alone or beside others, in one chunk
or in many, by one worker or several stages, on any pages, with any number of threads, as part of a
prompt or as a decode step."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kernels import selection
from penstock_runtime.kernels.native import Kernels
from penstock_runtime.model import transformer
from tests.unit.runtime.kernels.built import built_kernels

from .checkpoints import CONFIGS, PROMPTS, reference
from .test_parity import Sequences, stages, walk


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    built_kernels()
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: reference(CONFIGS[name], root / name))


@pytest.fixture(scope="module")
def whole(references):
    """Logits of every prompt of a model, each computed alone and in one chunk."""

    @cache
    def whole(name, dtype, pairs):
        known = references(name)
        models = load(known.path, [], dtype, pairs)
        logits = []
        for tokens in known.tokens:
            sequences = Sequences(models, page_size=32, count=1)
            logits.append(sequences.step([(0, tokens)]))
        return torch.stack(logits)

    return whole


def load(path, cuts, dtype, pairs):
    """Load the stages, with products of bfloat16 pairs (emulated here) or without."""
    kernels = Kernels()
    kernels.multiplies_bfloat16 = pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "Kernels", lambda: kernels)
        return stages(path, cuts, dtype=dtype, kernels="native")


steps = st.lists(
    st.dictionaries(
        st.integers(0, PROMPTS - 1),
        st.one_of(st.just(1), st.integers(1, 60)),
        min_size=1,
        max_size=PROMPTS,
    ),
    min_size=1,
    max_size=8,
)


@given(
    name=st.sampled_from(["llama", "llama-biased", "mistral", "qwen3"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    pairs=st.booleans(),
    cuts=st.sampled_from([[], [1], [2, 3]]),
    page_size=st.sampled_from([1, 2, 8, 32, 128]),
    threads=st.integers(1, 3),
    steps=steps,
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_bits_of_logits(
    references, whole, name, dtype, pairs, cuts, page_size, threads, steps, data
):
    expected = whole(name, dtype, pairs)
    known = references(name)
    sequences = Sequences(load(known.path, cuts, dtype, pairs), page_size, count=PROMPTS)
    torch.set_num_threads(threads)
    try:
        for parts, logits in walk(sequences, steps, known.tokens, expected):
            few = st.sets(st.integers(0, len(logits) - 1), max_size=5).map(sorted)
            wanted = data.draw(st.one_of(st.none(), few))
            expected_logits = logits if wanted is None else logits[wanted]
            assert torch.equal(sequences.step(parts, wanted), expected_logits)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("name", ["llama-biased", "qwen3"])
def test_layers_in_one_call_give_the_bits_of_their_parts(
    references, monkeypatch, name, dtype, pairs
):
    """Ranks that share a layer compute it part by part; a worker alone, all layers in one call."""
    known = references(name)
    models = [load(known.path, [1], dtype, pairs)]
    monkeypatch.setattr(transformer, "native_layers", lambda *_: None)
    models.append(load(known.path, [1], dtype, pairs))
    in_one, in_parts = (Sequences(each, page_size=8, count=2) for each in models)
    steps = [
        ([(0, known.tokens[0, :40])], [39]),
        ([(0, known.tokens[0, 40:41]), (1, known.tokens[1, :30])], [0]),
        ([(1, known.tokens[1, 30:50])], []),
        ([(0, known.tokens[0, 41:42]), (1, known.tokens[1, 50:])], None),
    ]
    pools = list(zip(in_one.pools, in_parts.pools, strict=True))
    for one, parts in pools:
        parts.copy_(one)
    for batch, rows in steps:
        assert torch.equal(in_one.step(batch, rows), in_parts.step(batch, rows))
    for one, parts in pools:
        assert torch.equal(one, parts)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_a_thread_and_columns_of_a_thread_give_the_same_bits(references, threads):
    """Of many rows each thread computes its own, of a few rows its own columns."""
    known = references("qwen3")
    models = load(known.path, [], torch.bfloat16, pairs=True)
    in_one, in_pieces = (Sequences(models, page_size=32, count=1) for _ in range(2))
    torch.set_num_threads(threads)
    try:
        together = in_one.step([(0, known.tokens[0, :96])])
        pieces = [in_pieces.step([(0, piece)]) for piece in known.tokens[0, :96].split(40)]
        assert torch.equal(together, torch.cat(pieces))
    finally:
        torch.set_num_threads(1)
