"""Which decode batches are replayed as CUDA graphs, and how they are padded. Pure.

A graph is of one batch size, so a batch takes the next size and is filled up with rows that nobody
looks at. Padding costs a row's share of the arithmetic only: at small sizes, where time goes into
reading weights, next to nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from penstock_runtime.attention.base import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALL = (1, 2, 4)
_STEPS = ((64, 8), (256, 16))
"""Up to a size, by how much the next is larger: the rows of padding are fewer."""
_LAST_STEP = 32


def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to capture, rising; the last is `max_batch`."""
    sizes = {size for size in _SMALL if size < max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += next((step for limit, step in _STEPS if size < limit), _LAST_STEP)
    return (*sorted(sizes), max_batch)


def size_for(segments: Sequence[Segment], sizes: Sequence[int]) -> int | None:
    """Return the size that a batch is padded to; None: it has a chunk, or too many rows."""
    at = bisect_left(sizes, len(segments))
    if at == len(sizes) or any(segment.length != 1 for segment in segments):
        return None
    return sizes[at]


def padded(segments: Sequence[Segment], size: int, padding_page: int) -> list[Segment]:
    """Return the segments, filled up to `size`.

    A padding row writes its KV to the first place of `padding_page`, which must be nobody's, and
    reads no other.
    """
    filler = Segment(start=0, length=1, pages=(padding_page,))
    return [*segments, *[filler] * (size - len(segments))]
