"""The page table of a batch in compressed rows, as kernels take it. Pure: host memory only.

Sequence i has the pages indices[indptr[i] : indptr[i + 1]], the last of which holds
last_page_len[i] tokens, those of the batch included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from penstock_runtime.kvcache.base import pages_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of B sequences. All int32, in host memory."""

    indptr: torch.Tensor
    """(B + 1,), from 0"""
    indices: torch.Tensor
    """(pages in all,)"""
    last_page_len: torch.Tensor
    """(B,), from 1 to the page size"""

    @classmethod
    def of(cls, segments: Sequence[Segment], page_size: int) -> PageTable:
        """Return the table of the segments' sequences, each up to its segment's end."""
        ends = [segment.start + segment.length for segment in segments]
        counts = [pages_for(end, page_size) for end in ends]
        indptr = np.zeros(len(segments) + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        pages = chain.from_iterable(
            segment.pages[:count] for segment, count in zip(segments, counts, strict=True)
        )
        indices = np.fromiter(pages, np.int32, count=int(indptr[-1]))
        last = np.array([(end - 1) % page_size + 1 for end in ends], np.int32)
        return cls(torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(last))

    def part(self, first: int, last: int) -> PageTable:
        """Return the table of the sequences [first, last)."""
        start, end = int(self.indptr[first]), int(self.indptr[last])
        return PageTable(
            self.indptr[first : last + 1] - start,
            self.indices[start:end],
            self.last_page_len[first:last],
        )


def token_places(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequence of each of the batch's tokens, and its position there: int32 (T,)."""
    lengths = np.array([segment.length for segment in segments])
    starts = np.array([segment.start for segment in segments])
    first_rows = np.cumsum(lengths) - lengths
    sequences = np.repeat(np.arange(len(segments), dtype=np.int32), lengths)
    positions = np.arange(lengths.sum()) + np.repeat(starts - first_rows, lengths)
    return torch.from_numpy(sequences), torch.from_numpy(positions.astype(np.int32))


def leading_decodes(segments: Sequence[Segment]) -> int:
    """Return how many segments, from the first on, have one token."""
    for index, segment in enumerate(segments):
        if segment.length != 1:
            return index
    return len(segments)
