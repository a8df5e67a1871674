"""The attention interface: queries of a mixed batch over paged KV.

Shape letters: T tokens of the batch, N query heads, K KV heads, H head dim, S page size.

A batch is a run of *segments*, one a sequence: a prefill chunk has many tokens, a decode step one.
`plan` is asked once a forward pass, for everything that does not depend on the layer; then, once a
layer, `write` puts the batch's own keys and values into their pages and `attend` reads all of them.
The two are apart because of the last layer: every token leaves its keys and values there, but the
output is wanted of a few rows at most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

PlanT = TypeVar("PlanT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in a batch.

    The batch's rows of this segment follow those of the segment before it. Its tokens have
    positions [start, start + length); KV of [0, start) is in `pages` already.
    """

    start: int
    length: int
    pages: Sequence[int]
    """Pages of the sequence in order; at least ceil((start + length) / page_size) of them."""


def single_rows(segments: Sequence[Segment], rows: Sequence[int]) -> list[Segment]:
    """Return rows of a batch, in rising order, as segments of one token each."""
    found: list[Segment] = []
    first, remaining = 0, iter(segments)
    segment = next(remaining, None)
    for row in rows:
        while segment is not None and row >= first + segment.length:
            first += segment.length
            segment = next(remaining, None)
        if segment is None or row < first:
            raise ValueError(f"rows {list(rows)} do not rise within the batch")
        position = segment.start + row - first
        found.append(Segment(start=position, length=1, pages=segment.pages))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What all batches of a model have in common: the heads of one process, and their dtype."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Of queries, keys, values and pages."""

    @property
    def scale(self) -> float:
        """What scores are multiplied by: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)


class AttentionBackend(ABC, Generic[PlanT]):
    """Causal attention over the pages of one worker's pool. One thread at a time."""

    @abstractmethod
    def plan(self, segments: Sequence[Segment], page_size: int, device: torch.device) -> PlanT:
        """Prepare what all layers share: page tables, slots to write, masks."""

    def plan_rows(self, segments: Sequence[Segment], page_size: int, device: torch.device) -> PlanT:
        """Prepare the attention of some rows of a batch, segments of one token each.

        For `attend` alone. The batch's own plan, made before, stays valid beside it.
        """
        return self.plan(segments, page_size, device)

    @abstractmethod
    def write(
        self, plan: PlanT, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """Put k and v into the layer's pages.

        `kv_layer` is the pool's view of one layer, (pages, 2, K, S, H), not contiguous.
        """

    @abstractmethod
    def attend(
        self, plan: PlanT, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return attention's output, (T, N, H), over what has been written.

        A query at position p sees the keys at positions [0, p] of its own sequence.
        """


class ProjectedAttention(AttentionBackend[PlanT]):
    """A backend that also does what lies between the projections and attention, in one pass."""

    @abstractmethod
    def write_projected(
        self,
        plan: PlanT,
        qkv_TW: torch.Tensor,
        heads: int,
        norm: tuple[torch.Tensor, float] | None,
        rotations: torch.Tensor,
        kv_layer: torch.Tensor,
    ) -> torch.Tensor:
        """Norm and rotate q and k, write k and v; return rows that begin with q, (T, (N + …) · H).

        Args:
            plan: of the batch.
            qkv_TW: the heads of q, k and v side by side, (T, (N + 2·K) · H); changed.
            heads: N.
            norm: weights (N + K, H) and epsilon of an RMS norm over each head, or none.
            rotations: complex64 (T, 1, H / 2): what pairs of neighbours in q and k are
                multiplied by.
            kv_layer: as for `write`.
        """

    @abstractmethod
    def attend_projected(
        self, plan: PlanT, q_TW: torch.Tensor, heads: int, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return attention's output, (T, N · H). `q_TW`: rows that `write_projected` returned."""
