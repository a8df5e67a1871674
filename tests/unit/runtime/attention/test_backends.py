"""Every backend equals the definition, whatever the batch, pages and shapes."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.attention.base import AttentionBackend, AttentionShape, Segment
from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.paged_cpu import (
    PagedCpuAttention,
    Timings,
    group_by_size,
    merge,
    padded_pages,
)
from penstock_runtime.attention.paged_native import PagedNativeAttention
from penstock_runtime.attention.reference import ReferenceAttention
from penstock_runtime.attention.registry import create_attention
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kvcache.base import KVLayout, pages_for
from penstock_runtime.kvcache.tensors import PoolTensor
from tests.unit.runtime.kernels.built import built_kernels

CPU = torch.device("cpu")
LAYERS = 3


def make_pool(pages: int, kv_heads: int, page_size: int, head_dim: int, dtype=torch.float32):
    """Return a pool full of what other requests left behind."""
    layout = KVLayout(
        first_layer=0,
        last_layer=LAYERS,
        planes=2,
        kv_heads=kv_heads,
        page_size=page_size,
        head_dim=head_dim,
        itemsize=dtype.itemsize,
    )
    pool = PoolTensor(layout, pages, dtype=dtype, device=CPU)
    pool.tensor.normal_(0, 3, generator=torch.Generator().manual_seed(pages))
    return pool


def make_segments(spans: list[tuple[int, int]], page_size: int) -> tuple[list[Segment], int]:
    """Return segments of (start, length) with private pages in random order, and their number."""
    counts = [pages_for(start + length, page_size) for start, length in spans]
    shuffled = list(range(sum(counts)))
    random.Random(len(shuffled)).shuffle(shuffled)
    segments, at = [], 0
    for (start, length), count in zip(spans, counts, strict=True):
        segments.append(Segment(start=start, length=length, pages=shuffled[at : at + count]))
        at += count
    return segments, len(shuffled)


def queries(spans, heads, kv_heads, head_dim, dtype=torch.float32):
    """Return q, k and v as slices of one tensor, as a fused projection gives them."""
    tokens = sum(length for _, length in spans)
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    return torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)


def write_and_attend(backend, plan, qkv, kv_layer, scale):
    """Return the output of a batch whose q, k and v are given."""
    q, k, v = qkv
    backend.write(plan, k, v, kv_layer)
    return backend.attend(plan, q, kv_layer, scale)


def run(backend, spans, *, heads, kv_heads, head_dim, page_size, layer=1, scale=0.3, **dtypes):
    """Return a backend's output and the pool after it, for the same inputs every time."""
    segments, pages = make_segments(spans, page_size)
    pool = make_pool(pages, kv_heads, page_size, head_dim, dtypes.get("kv", torch.float32))
    qkv = queries(spans, heads, kv_heads, head_dim, dtypes.get("q", torch.float32))
    plan = backend.plan(segments, page_size, CPU)
    return write_and_attend(backend, plan, qkv, pool.layer(layer), scale), pool.tensor


span = st.one_of(
    st.tuples(st.integers(0, 90), st.just(1)), st.tuples(st.integers(0, 60), st.integers(1, 30))
)


@given(
    spans=st.lists(span, min_size=1, max_size=7),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4, 7]),
    head_dim=st.sampled_from([2, 6, 16, 40]),
    page_size=st.sampled_from([1, 4, 16, 64]),
    layer=st.integers(0, LAYERS - 1),
    backend=st.one_of(
        st.just(DenseAttention()),
        st.builds(PagedCpuAttention, st.sampled_from([1, 32, 4096]), st.sampled_from([1, 64])),
        st.builds(lambda: PagedNativeAttention(built_kernels())),
    ),
)
@settings(max_examples=90, deadline=None)
def test_equals_the_definition(spans, kv_heads, group, head_dim, page_size, layer, backend):
    shape = {
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "layer": layer,
    }
    expected, expected_pool = run(ReferenceAttention(), spans, **shape)
    actual, pool = run(backend, spans, **shape)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(pool, expected_pool)


def test_the_definition_itself():
    """One head, worked out by hand: a query at position p weighs the keys 0 … p."""
    pool = make_pool(pages=1, kv_heads=1, page_size=4, head_dim=2)
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    k = torch.tensor([[[1.0, 1.0]], [[3.0, 0.5]]])
    v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    backend = ReferenceAttention()
    plan = backend.plan([Segment(start=0, length=2, pages=[0])], 4, CPU)
    out = write_and_attend(backend, plan, (q, k, v), pool.layer(0), 1.0)
    first = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + torch.tensor(1.0).exp())
    assert torch.equal(out[0, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(out[1, 0], torch.stack([first, 1 - first]))


@pytest.mark.parametrize("backend", [PagedCpuAttention(), PagedCpuAttention(8, 8)])
@pytest.mark.parametrize("q", [torch.float32, torch.bfloat16])
def test_pages_in_half_precision(backend, q):
    """Arithmetic in the dtype of q over bfloat16 pages."""
    spans = [(5, 1), (0, 20), (30, 9), (40, 1), (41, 1)]
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "page_size": 8}
    expected, _ = run(ReferenceAttention(), spans, **shape, kv=torch.bfloat16, q=torch.float32)
    actual, _ = run(backend, spans, **shape, kv=torch.bfloat16, q=q)
    tolerance = 1e-4 if q == torch.float32 else 5e-2
    assert actual.dtype == q
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@given(
    spans=st.lists(span, min_size=2, max_size=6),
    page_size=st.sampled_from([4, 16]),
    alone=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_the_rest_of_the_batch(spans, page_size, alone):
    alone %= len(spans)
    backend = PagedCpuAttention(32, 64)
    segments, pages = make_segments(spans, page_size)
    q, k, v = queries(spans, 4, 2, 16)
    first = sum(length for _, length in spans[:alone])
    rows = slice(first, first + spans[alone][1])

    def attend(chosen, rows):
        pool = make_pool(pages, 2, page_size, 16)
        plan = backend.plan(chosen, page_size, CPU)
        qkv = q[rows], k[rows], v[rows]
        return write_and_attend(backend, plan, qkv, pool.layer(0), 0.25)

    together = attend(segments, slice(None))[rows]
    assert torch.equal(attend([segments[alone]], rows), together)


def test_a_plan_serves_every_layer():
    spans = [(7, 1), (3, 6)]
    segments, pages = make_segments(spans, 4)
    qkv = queries(spans, 4, 2, 8)
    outputs = []
    backends: tuple[AttentionBackend[Any], ...] = (ReferenceAttention(), PagedCpuAttention())
    for backend in backends:
        pool = make_pool(pages, 2, 4, 8)
        plan = backend.plan(segments, 4, CPU)
        outputs.append(
            torch.stack(
                [write_and_attend(backend, plan, qkv, pool.layer(i), 0.5) for i in range(LAYERS)]
            )
        )
    assert not torch.equal(outputs[0][0], outputs[0][1])
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=1e-4)


def test_timings_count_attention_and_gathering():
    backend = PagedCpuAttention()
    backend.timings = Timings()
    run(backend, [(9, 1), (4, 5)], heads=2, kv_heads=1, head_dim=8, page_size=4)
    assert 0 < backend.timings.gather < backend.timings.attention


@given(keys=st.integers(2, 12), cut=st.integers(1, 11))
@settings(max_examples=20, deadline=None)
def test_merge_of_two_parts_is_attention_over_both(keys, cut):
    cut = min(cut, keys - 1)
    generator = torch.Generator().manual_seed(keys)
    scores = torch.randn(keys, generator=generator) * 5
    values = torch.randn(keys, 4, generator=generator)

    def attend(part):
        return scores[part].softmax(0) @ values[part], scores[part].logsumexp(0)

    merged, lse = merge(*attend(slice(cut)), *attend(slice(cut, None)))
    expected, expected_lse = attend(slice(None))
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(lse, expected_lse)


@given(pages=st.lists(st.integers(1, 500), max_size=40), max_pages=st.integers(0, 600))
@settings(max_examples=60)
def test_groups_hold_every_row_once_and_stay_small(pages, max_pages):
    groups = group_by_size(pages, max_pages)
    members = [index for of_size in groups.values() for group in of_size for index in group]
    assert sorted(members) == list(range(len(pages)))
    for size, of_size in groups.items():
        for group in of_size:
            assert len(group) == 1 or len(group) * size <= max_pages
            assert all(padded_pages(pages[index]) == size for index in group)


@given(pages=st.integers(1, 100_000))
def test_padding_is_at_most_an_eighth(pages):
    assert pages <= padded_pages(pages) <= pages * 1.125


def shape(dtype):
    return AttentionShape(heads=4, kv_heads=2, head_dim=64, dtype=dtype)


def test_each_device_has_a_backend(monkeypatch):
    assert isinstance(create_attention(CPU, shape(torch.bfloat16)), PagedCpuAttention)
    cuda = torch.device("cuda", 0)
    assert isinstance(create_attention(cuda, shape(torch.float32)), DenseAttention)
    with pytest.raises(ValueError, match=r"no attention backend for meta; supported are"):
        create_attention(torch.device("meta"), shape(torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigurationError, match=r"install penstock's `gpu` extra"):
        create_attention(cuda, shape(torch.bfloat16))


def test_the_kernels_have_a_backend_of_their_own():
    assert isinstance(
        create_attention(CPU, shape(torch.float32), built_kernels()), PagedNativeAttention
    )
