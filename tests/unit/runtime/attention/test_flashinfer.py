"""The CUDA backend, over FlashInfer's stand-in, equals the definition; tables and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.attention.base import AttentionShape, Segment, single_rows
from penstock_runtime.attention.flashinfer import FlashInferAttention, check_supported
from penstock_runtime.attention.page_table import PageTable, leading_decodes, token_places
from penstock_runtime.attention.reference import ReferenceAttention
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kvcache.base import pages_for
from tests.unit.runtime import fake_flashinfer
from tests.unit.runtime.attention.test_backends import (
    CPU,
    LAYERS,
    make_pool,
    make_segments,
    queries,
    span,
    write_and_attend,
)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    monkeypatch.setattr("penstock_runtime.attention.flashinfer._WORKSPACE_BYTES", 16)


def make_backend(heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    shape = AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    return FlashInferAttention(fake_flashinfer, shape, CPU)


@given(
    spans=st.lists(span, min_size=1, max_size=7),
    decodes_first=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    head_dim=st.sampled_from([2, 8, 16]),
    page_size=st.sampled_from([1, 4, 16, 64]),
    layer=st.integers(0, LAYERS - 1),
)
@settings(max_examples=80, deadline=None)
def test_equals_the_definition(spans, decodes_first, kv_heads, group, head_dim, page_size, layer):
    if decodes_first:
        spans = sorted(spans, key=lambda one: one[1] != 1)
    heads = kv_heads * group
    segments, pages = make_segments(spans, page_size)
    qkv = queries(spans, heads, kv_heads, head_dim)
    outputs, pools = [], []
    for backend in (ReferenceAttention(), make_backend(heads, kv_heads, head_dim)):
        pool = make_pool(pages, kv_heads, page_size, head_dim)
        plan = backend.plan(segments, page_size, CPU)
        outputs.append(write_and_attend(backend, plan, qkv, pool.layer(layer), head_dim**-0.5))
        pools.append(pool.tensor)
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(pools[1], pools[0])


def test_a_plan_serves_every_layer():
    spans = [(7, 1), (3, 6)]
    segments, pages = make_segments(spans, 4)
    qkv = queries(spans, 4, 2, 8)
    backend, pool = make_backend(), make_pool(pages, 2, 4, 8)
    plan = backend.plan(segments, 4, CPU)
    for index in range(LAYERS):
        expected_pool = make_pool(pages, 2, 4, 8)
        reference = ReferenceAttention()
        expected = write_and_attend(
            reference,
            reference.plan(segments, 4, CPU),
            qkv,
            expected_pool.layer(index),
            8**-0.5,
        )
        actual = write_and_attend(backend, plan, qkv, pool.layer(index), 8**-0.5)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_wanted_rows_are_planned_beside_their_batch():
    """Planning them leaves the batch's plan as it was; both are used in turn, layer after layer."""
    spans, rows = [(7, 1), (12, 1), (3, 6), (0, 20)], [1, 7, 27]
    segments, pages = make_segments(spans, 4)
    q, k, v = queries(spans, 4, 2, 8)
    backend, pool = make_backend(), make_pool(pages, 2, 4, 8)
    plan = backend.plan(segments, 4, CPU)
    wanted = backend.plan_rows(single_rows(segments, rows), 4, CPU)
    for index in range(LAYERS):
        whole = write_and_attend(backend, plan, (q, k, v), pool.layer(index), 8**-0.5)
        some = backend.attend(wanted, q[rows], pool.layer(index), 8**-0.5)
        torch.testing.assert_close(some, whole[rows], atol=2e-5, rtol=1e-4)


def test_another_scale_is_refused():
    spans = [(7, 1)]
    segments, pages = make_segments(spans, 4)
    backend = make_backend()
    plan = backend.plan(segments, 4, CPU)
    with pytest.raises(ValueError, match="planned for a scale"):
        backend.attend(plan, queries(spans, 4, 2, 8)[0], make_pool(pages, 2, 4, 8).layer(0), 0.3)


@given(
    batches=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=30, deadline=None)
def test_fixed_plans_follow_their_batches_and_keep_their_memory(batches, page_size):
    backend = make_backend()
    fixed = backend.fixed_decodes([1, 3, 5], pages_for(41, page_size))[3]
    addresses = [tensor.data_ptr() for tensor in tables(fixed.plan)]
    for starts in batches:
        spans = [(start, 1) for start in starts]
        segments, pages = make_segments(spans, page_size)
        fixed.set(segments, page_size)
        assert [tensor.data_ptr() for tensor in tables(fixed.plan)] == addresses
        assert fixed.positions.tolist() == starts
        qkv = queries(spans, 4, 2, 8)
        pool, expected_pool = (make_pool(pages, 2, page_size, 8) for _ in range(2))
        reference = ReferenceAttention()
        expected = write_and_attend(
            reference,
            reference.plan(segments, page_size, CPU),
            qkv,
            expected_pool.layer(1),
            8**-0.5,
        )
        actual = write_and_attend(backend, fixed.plan, qkv, pool.layer(1), 8**-0.5)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(pool.tensor, expected_pool.tensor)


def tables(plan):
    to = plan.appends
    return to.sequences, to.positions, to.indptr, to.indices, to.last_page_len


# --- page tables ---------------------------------------------------------------------------------


@given(spans=st.lists(span, min_size=1, max_size=9), page_size=st.sampled_from([1, 3, 16]))
@settings(max_examples=60)
def test_tables_describe_the_segments(spans, page_size):
    segments, _ = make_segments(spans, page_size)
    table = PageTable.of(segments, page_size)
    for i, segment in enumerate(segments):
        pages = table.indices[table.indptr[i] : table.indptr[i + 1]].tolist()
        assert pages == list(segment.pages)
        tokens = (len(pages) - 1) * page_size + int(table.last_page_len[i])
        assert tokens == segment.start + segment.length
    sequences, positions = token_places(segments)
    expected = [
        (i, position)
        for i, s in enumerate(segments)
        for position in range(s.start, s.start + s.length)
    ]
    assert list(zip(sequences.tolist(), positions.tolist(), strict=True)) == expected
    all_int32 = (table.indptr, table.indices, table.last_page_len, sequences, positions)
    assert {tensor.dtype for tensor in all_int32} == {torch.int32}


@given(
    spans=st.lists(span, min_size=2, max_size=9),
    cut=st.integers(1, 8),
    page_size=st.sampled_from([1, 16]),
)
@settings(max_examples=40)
def test_a_part_of_a_table_is_the_table_of_the_part(spans, cut, page_size):
    cut = min(cut, len(spans) - 1)
    segments, _ = make_segments(spans, page_size)
    whole = PageTable.of(segments, page_size)
    for first, last in ((0, cut), (cut, len(spans))):
        part, expected = whole.part(first, last), PageTable.of(segments[first:last], page_size)
        assert part.indptr.tolist() == expected.indptr.tolist()
        assert part.indices.tolist() == expected.indices.tolist()
        assert part.last_page_len.tolist() == expected.last_page_len.tolist()


def test_pages_beyond_a_segments_end_are_left_out():
    table = PageTable.of([Segment(start=3, length=1, pages=(7, 8, 9))], 4)
    assert table.indices.tolist() == [7]
    assert table.last_page_len.tolist() == [4]


@pytest.mark.parametrize(
    ("lengths", "decodes"), [([1, 1], 2), ([1, 5, 1], 1), ([5, 1], 0), ([1], 1)]
)
def test_leading_decodes(lengths, decodes):
    segments = [Segment(start=0, length=length, pages=range(2)) for length in lengths]
    assert leading_decodes(segments) == decodes


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "message"),
    [
        (80, torch.bfloat16, (9, 0), "no kernel for heads of 80 elements.*use --dtype float32"),
        (128, torch.bfloat16, (7, 5), "capability 8.0 or later, this one has 7.5: use --dtype "),
        (128, torch.bfloat16, (7, 5), "--dtype float16 or --dtype float32"),
        (128, torch.float16, (7, 0), "capability 7.5 or later, this one has 7.0: use --dtype f"),
    ],
)
def test_what_has_no_kernel_is_refused_with_the_remedy(head_dim, dtype, capability, message):
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype)
    with pytest.raises(ConfigurationError, match=message):
        check_supported(shape, capability)


@pytest.mark.parametrize(("dtype", "oldest"), [(torch.float16, (7, 5)), (torch.bfloat16, (8, 0))])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_has_a_kernel_is_taken(head_dim, dtype, oldest):
    check_supported(AttentionShape(heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype), oldest)
