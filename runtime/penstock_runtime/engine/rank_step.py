"""A step as rank 0 tells it to the other ranks, which have no decision to make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from penstock_runtime.attention.base import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence


class RankSegment(msgspec.Struct, frozen=True, array_like=True):
    """See `attention.base.Segment`."""

    start: int
    length: int
    pages: tuple[int, ...]


class RankStep(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass."""

    segments: tuple[RankSegment, ...]
    tokens: bytes
    """Token ids as int32. Empty: hidden states come from rank 0."""
    wanted: tuple[int, ...] | None
    """Rows whose hidden states are wanted, and then their logits; None: all, without logits."""

    @classmethod
    def of(
        cls, segments: Sequence[Segment], tokens: bytes, wanted: Sequence[int] | None
    ) -> RankStep:
        """Return the step of a batch."""
        told = tuple(RankSegment(s.start, s.length, tuple(s.pages)) for s in segments)
        return cls(told, tokens, None if wanted is None else tuple(wanted))

    def batch(self) -> list[Segment]:
        """Return the segments as the attention takes them."""
        return [Segment(start=s.start, length=s.length, pages=s.pages) for s in self.segments]


class Followers(Protocol):
    """The other ranks of this worker."""

    def tell(self, step: RankStep) -> None:
        """Have them compute their part of a step. Called on the compute thread."""
        ...


class NoFollowers:
    """There is one rank."""

    def tell(self, step: RankStep) -> None:
        """Nobody is told."""
