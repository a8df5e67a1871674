"""Where the keys and values of a batch's own tokens go, and writing them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment


def slots_of(segments: Sequence[Segment], page_size: int) -> tuple[list[int], list[int]]:
    """Return the page, and the place in it, of each of the segments' tokens, in batch order."""
    pages: list[int] = []
    offsets: list[int] = []
    for segment in segments:
        for position in range(segment.start, segment.start + segment.length):
            pages.append(segment.pages[position // page_size])
            offsets.append(position % page_size)
    return pages, offsets


@dataclass(frozen=True, slots=True)
class Slots:
    """The page, and the place in it, of each token of the batch. Both int64 (T,)."""

    pages: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], page_size: int, device: torch.device) -> Slots:
        """Return the slots of the segments' tokens, in batch order."""
        pages, offsets = slots_of(segments, page_size)
        return cls(
            torch.tensor(pages, dtype=torch.int64, device=device),
            torch.tensor(offsets, dtype=torch.int64, device=device),
        )

    def write(self, kv_layer: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Put k and v into the layer's pages, (pages, 2, K, S, H), in the pages' dtype."""
        for plane, x_TKH in enumerate((k_TKH, v_TKH)):
            kv_layer[:, plane].transpose(1, 2)[self.pages, self.offsets] = x_TKH.to(kv_layer.dtype)
