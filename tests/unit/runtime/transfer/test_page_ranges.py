"""Every head of every layer arrives where it belongs, however both sides divide the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.kvcache.base import KVLayout
from penstock_runtime.transfer.page_ranges import Side, page_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_SIZE, HEAD_DIM = 2, 3


class Worker:
    """One side's pools: page p, layer l, plane, head h hold a number made of all four."""

    def __init__(self, ranks: int, kv_heads: int, layers: tuple[int, int], pages: int) -> None:
        self.layers = layers
        self.heads = [_heads(rank, ranks, kv_heads) for rank in range(ranks)]
        self.pools: list[NDArray[np.uint32]] = [
            np.zeros(
                (pages, layers[1] - layers[0], 2, last - first, PAGE_SIZE, HEAD_DIM), np.uint32
            )
            for first, last in self.heads
        ]

    def fill(self) -> None:
        """Mark every element by its layer, plane and head, and the page that it is in."""
        for pool, (first, last) in zip(self.pools, self.heads, strict=True):
            pages = np.arange(len(pool))[:, None, None, None] * 10**6
            layers = np.arange(*self.layers)[None, :, None, None] * 10**3
            planes = np.arange(2)[None, None, :, None] * 10**2
            heads = np.arange(first, last)[None, None, None, :]
            marks = pages + layers + planes + heads + 1
            pool[:] = marks[..., None, None] + np.zeros((PAGE_SIZE, HEAD_DIM), np.uint32)

    def side(self, pages: list[int]) -> Side:
        """Return these pages of it."""
        addresses = [pool.ctypes.data for pool in self.pools]
        return Side(list(zip(addresses, self.heads, strict=True)), self.layers, pages)

    def copy(self, local: NDArray[np.uint64], other: Worker, remote: NDArray[np.uint64]) -> None:
        """Write `local` ranges of this worker into `remote` ones of the other."""
        for (source, nbytes), (target, same) in zip(local, remote, strict=True):
            assert nbytes == same
            other.view(int(target), int(nbytes))[:] = self.view(int(source), int(nbytes))

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Return the bytes at an address, which lie in one of the pools."""
        for pool in self.pools:
            offset = address - pool.ctypes.data
            if offset >= 0 and offset + nbytes <= pool.nbytes:
                return pool.reshape(-1).view(np.uint8)[offset : offset + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} lie in no pool")


def _heads(rank: int, ranks: int, kv_heads: int) -> tuple[int, int]:
    if ranks <= kv_heads:
        return rank * kv_heads // ranks, (rank + 1) * kv_heads // ranks
    head = rank * kv_heads // ranks
    return head, head + 1


def layout(kv_heads: int = 1) -> KVLayout:
    return KVLayout(
        first_layer=0,
        last_layer=1,
        planes=2,
        kv_heads=kv_heads,
        page_size=PAGE_SIZE,
        head_dim=HEAD_DIM,
        itemsize=4,
    )


@given(
    kv_heads=st.sampled_from([1, 2, 4, 6]),
    source_ranks=st.sampled_from([1, 2, 4, 8]),
    target_ranks=st.sampled_from([1, 2, 3, 4]),
    borders=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 3)),
    data=st.data(),
    reading=st.booleans(),
)
def test_every_head_arrives(kv_heads, source_ranks, target_ranks, borders, data, reading) -> None:
    """A stage with some layers writes into, or reads from, a worker with all."""
    before, held, behind = borders
    stage_layers, all_layers = (before, before + held), (0, before + held + behind)
    pages = 5
    source = Worker(source_ranks, kv_heads, all_layers if reading else stage_layers, pages)
    target = Worker(target_ranks, kv_heads, stage_layers if reading else all_layers, pages)
    source.fill()
    count = data.draw(st.integers(0, pages))
    source_pages = data.draw(st.permutations(range(pages)))[:count]
    target_pages = data.draw(st.permutations(range(pages)))[:count]
    left, right = page_ranges(
        layout(), stage_layers, source.side(source_pages), target.side(target_pages)
    )
    source.copy(left, target, right)

    expected = Worker(target_ranks, kv_heads, target.layers, pages)
    expected.fill()
    rows = slice(before, before + held) if not reading else slice(0, held)
    for pool, wanted in zip(target.pools, expected.pools, strict=True):
        seen = np.zeros_like(pool)
        for ours, theirs in zip(target_pages, source_pages, strict=True):
            shift = (theirs - ours) * 10**6
            seen[ours, rows] = wanted[ours, rows].astype(np.int64) + shift
        np.testing.assert_array_equal(pool, seen)


def test_equal_heads_are_one_range_a_page() -> None:
    source, target = Worker(2, 4, (1, 3), 4), Worker(2, 4, (0, 4), 4)
    left, right = page_ranges(layout(), (1, 3), source.side([0, 3]), target.side([1, 2]))
    assert left.shape == right.shape == (4, 2)


def test_a_head_that_is_nowhere_is_an_error() -> None:
    source, target = Worker(2, 4, (0, 1), 1), Worker(1, 4, (0, 1), 1)
    half = Side(source.side([0]).arenas[:1], source.layers, [0])
    with pytest.raises(ValueError, match="head 2 is in no arena"):
        page_ranges(layout(), (0, 1), half, target.side([0]))
