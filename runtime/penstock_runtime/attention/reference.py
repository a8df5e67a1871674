"""Attention by its definition, in float32: what other backends must equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import AttentionBackend, Segment
from penstock_runtime.attention.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The segments as they came, and where to write."""

    segments: tuple[Segment, ...]
    slots: Slots


class ReferenceAttention(AttentionBackend[ReferencePlan]):
    """softmax(q·Kᵀ·scale)·V over the keys at or before each query, on any device."""

    def plan(
        self, segments: Sequence[Segment], page_size: int, device: torch.device
    ) -> ReferencePlan:
        """Keep the segments."""
        return ReferencePlan(tuple(segments), Slots.of(segments, page_size, device))

    def write(
        self, plan: ReferencePlan, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """See the interface."""
        plan.slots.write(kv_layer, k_TKH, v_TKH)

    def attend(
        self, plan: ReferencePlan, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Segment by segment."""
        parts = torch.split(q_TNH, [segment.length for segment in plan.segments])
        return torch.cat(
            [
                _attend(segment, q_MNH, kv_layer, scale)
                for segment, q_MNH in zip(plan.segments, parts, strict=True)
            ]
        )


def _attend(
    segment: Segment, q_MNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
) -> torch.Tensor:
    tokens = segment.start + segment.length
    kv_heads, page_size, head_dim = kv_layer.shape[2:]
    pages = list(segment.pages)[: -(-tokens // page_size)]
    kv = kv_layer[pages].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :tokens]
    keys_NLH, values_NLH = kv.float().repeat_interleave(q_MNH.shape[1] // kv_heads, dim=1)
    scores_NML = torch.einsum("mnh,nlh->nml", q_MNH.float(), keys_NLH) * scale
    position = torch.arange(segment.start, tokens, device=scores_NML.device)
    unseen = torch.arange(tokens, device=scores_NML.device) > position[:, None]
    weights_NML = scores_NML.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("nml,nlh->mnh", weights_NML, values_NLH).to(q_MNH.dtype)
