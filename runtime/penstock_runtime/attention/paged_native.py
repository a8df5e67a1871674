"""Attention on the CPU by the C++ kernels: pages are read in place, nothing is gathered.

A row's output has the same bits whatever the batch, the chunks, the pages and the threads, and
whether it came as part of a chunk or as a decode step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import ProjectedAttention
from penstock_runtime.attention.slots import Slots, slots_of
from penstock_runtime.kernels.native import KvPages, Segments, TokenSlots
from penstock_runtime.kvcache.base import pages_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment
    from penstock_runtime.kernels.native import Kernels


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A batch as the kernels take it."""

    slots: TokenSlots
    segments: Segments


class PagedNativeAttention(ProjectedAttention[NativePlan]):
    """Attention over pages by the kernels.

    Products are of float32; of pairs of bfloat16 where pages are of bfloat16, as the model then is,
    and the processor has instructions for them. Sums are float32.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.round_inputs = kernels.multiplies_bfloat16
        """As for `Kernels.attention`."""
        self._layers: dict[tuple[int, torch.Size, torch.dtype], KvPages] = {}
        """By address and shape: finding out how a layer lies costs more than a look here."""

    def plan(
        self,
        segments: Sequence[Segment],
        page_size: int,
        device: torch.device,  # noqa: ARG002 - tables for the kernels are always on the CPU
    ) -> NativePlan:
        """List the segments' rows and pages."""
        rows: list[int] = []
        pages: list[int] = []
        first_page: list[int] = []
        positions: list[int] = []
        for segment in segments:
            end = segment.start + segment.length
            rows.append(len(positions))
            first_page.append(len(pages))
            pages += segment.pages[: pages_for(end, page_size)]
            positions += range(segment.start, end)
        return NativePlan(
            TokenSlots(positions, *slots_of(segments, page_size)),
            Segments(
                starts=[segment.start for segment in segments],
                lengths=[segment.length for segment in segments],
                first_rows=rows,
                first_pages=first_page,
                pages=pages,
            ),
        )

    def write(
        self, plan: NativePlan, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """See the interface."""
        slots = plan.slots
        Slots(torch.tensor(slots.pages), torch.tensor(slots.offsets)).write(kv_layer, k_TKH, v_TKH)

    def attend(
        self, plan: NativePlan, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See the interface."""
        tokens, heads, _ = q_TNH.shape
        q_TW = q_TNH.float().reshape(tokens, -1)
        out_TW = self.attend_projected(plan, q_TW, heads, kv_layer, scale)
        return out_TW.view(tokens, heads, -1).to(q_TNH.dtype)

    def write_projected(
        self,
        plan: NativePlan,
        qkv_TW: torch.Tensor,
        heads: int,
        norm: tuple[torch.Tensor, float] | None,
        rotations: torch.Tensor,
        kv_layer: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, rotate and write in one pass."""
        qkv_TW = qkv_TW.float()
        self._kernels.attention_inputs(
            qkv_TW,
            heads=heads,
            norm=norm,
            rotations=rotations,
            slots=plan.slots,
            kv=self._pages(kv_layer),
        )
        return qkv_TW

    def attend_projected(
        self, plan: NativePlan, q_TW: torch.Tensor, heads: int, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See the interface."""
        return self._kernels.attention(
            q_TW,
            plan.segments,
            self._pages(kv_layer),
            heads=heads,
            scale=scale,
            round_inputs=self.round_inputs,
        )

    def _pages(self, kv_layer: torch.Tensor) -> KvPages:
        key = (kv_layer.data_ptr(), kv_layer.shape, kv_layer.dtype)
        pages = self._layers.get(key)
        if pages is None or pages.page_stride != kv_layer.stride(0):
            pages = self._layers[key] = KvPages(*kv_layer.unbind(1))
        return pages
