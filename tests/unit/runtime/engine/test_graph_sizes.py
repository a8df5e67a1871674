"""Which batches a graph serves, and what they are filled up with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.graph_sizes import graph_sizes, padded, size_for


def decode(position: int = 5) -> Segment:
    return Segment(start=position, length=1, pages=(3, 4))


@given(max_batch=st.integers(1, 1000))
def test_sizes_rise_to_the_largest_batch_in_small_steps(max_batch: int) -> None:
    sizes = graph_sizes(max_batch)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, max_batch)
    for before, size in itertools.pairwise(sizes):
        assert size - before <= max(min(before, 8), 16 if before >= 64 else 8, before // 8)
    assert len(sizes) <= 50


def test_the_default_ladder() -> None:
    assert graph_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert graph_sizes(5) == (1, 2, 4, 5)


@given(max_batch=st.integers(1, 300), rows=st.integers(1, 320))
def test_a_decode_batch_takes_the_next_size(max_batch: int, rows: int) -> None:
    sizes = graph_sizes(max_batch)
    size = size_for([decode()] * rows, sizes)
    if rows > max_batch:
        assert size is None
    else:
        assert size == min(candidate for candidate in sizes if candidate >= rows)


@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_with_a_chunk_has_no_graph(at: int) -> None:
    segments = [decode(), decode()]
    segments.insert(at, Segment(start=0, length=2, pages=(1,)))
    assert size_for(segments, graph_sizes(8)) is None


@given(rows=st.integers(0, 9), spare=st.integers(0, 7))
def test_padding_touches_its_own_page_only(rows: int, spare: int) -> None:
    segments = [decode(position) for position in range(rows)]
    filled = padded(segments, rows + spare, padding_page=11)
    assert filled[:rows] == segments
    assert len(filled) == rows + spare
    for filler in filled[rows:]:
        assert (filler.start, filler.length, list(filler.pages)) == (0, 1, [11])
