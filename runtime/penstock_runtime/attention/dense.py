"""Attention on any device with nothing but torch: gather a segment's pages, mask, one SDPA call.

For float32 on CUDA, where the paged kernels know 16-bit dtypes only. Exact, and simple before fast:
each segment's pages are copied, and a chunk at an offset needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from penstock_runtime.attention.base import AttentionBackend
from penstock_runtime.attention.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment


@dataclass(frozen=True, slots=True)
class DenseSegment:
    """One segment's page table and mask, on the device."""

    length: int
    tokens: int
    """Keys: those before the segment and its own."""
    pages: torch.Tensor
    """(P,)"""
    mask: torch.Tensor | None
    """Which keys each query sees, (queries, keys); None: all."""


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The batch's segments in order, and where to write."""

    segments: list[DenseSegment]
    slots: Slots


class DenseAttention(AttentionBackend[DensePlan]):
    """One scaled_dot_product_attention a segment."""

    def plan(self, segments: Sequence[Segment], page_size: int, device: torch.device) -> DensePlan:
        """Copy page tables and masks to the device."""
        return DensePlan(
            [_dense_segment(segment, page_size, device) for segment in segments],
            Slots.of(segments, page_size, device),
        )

    def write(
        self, plan: DensePlan, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """See the interface."""
        plan.slots.write(kv_layer, k_TKH, v_TKH)

    def attend(
        self, plan: DensePlan, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Segment by segment."""
        parts = torch.split(q_TNH, [segment.length for segment in plan.segments])
        return torch.cat(
            [
                _attend(segment, q_MNH, kv_layer, scale)
                for segment, q_MNH in zip(plan.segments, parts, strict=True)
            ]
        )


def _dense_segment(segment: Segment, page_size: int, device: torch.device) -> DenseSegment:
    tokens = segment.start + segment.length
    pages = list(segment.pages)[: -(-tokens // page_size)]
    mask = None
    if segment.length > 1:
        mask = torch.ones(segment.length, tokens, dtype=torch.bool, device=device)
        mask = mask.tril(segment.start)
    return DenseSegment(segment.length, tokens, torch.tensor(pages, device=device), mask)


def _attend(
    segment: DenseSegment, q_MNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
) -> torch.Tensor:
    kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
    kv = kv_layer[segment.pages].permute(1, 2, 0, 3, 4).reshape(2, 1, kv_heads, -1, head_dim)
    keys_1KLH, values_1KLH = kv[:, :, :, : segment.tokens].to(q_MNH.dtype)
    out_1NMH = functional.scaled_dot_product_attention(
        q_MNH.transpose(0, 1)[None],
        keys_1KLH,
        values_1KLH,
        attn_mask=segment.mask,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NMH[0].transpose(0, 1)
