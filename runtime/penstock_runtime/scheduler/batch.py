"""One step of a decode worker, as the engine turns it into tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.scheduler.cost_model import Chunk

if TYPE_CHECKING:
    from array import array


@dataclass(frozen=True, slots=True)
class BatchSegment:
    """Tokens [start, start + length) of one request: consecutive rows of the batch."""

    request_id: str
    start: int
    tokens: array[int]
    """The tokens themselves; a copy, so the compute thread may read it at any time."""
    pages: tuple[int, ...]
    """Pages of the sequence up to the segment's end."""
    sample: bool
    """Whether the last row's logits choose the next token."""
    position: int
    """Output position of that token, for the random number."""
    ahead: bool = False
    """Its one token is what the step before chooses, which was not known yet: `tokens` has a 0."""

    @property
    def length(self) -> int:
        """Rows of this segment."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: segments in the order of their rows, those that decode first."""

    segments: tuple[BatchSegment, ...]

    @property
    def tokens(self) -> int:
        """Rows of the whole batch."""
        return sum(segment.length for segment in self.segments)

    @property
    def chunks(self) -> list[Chunk]:
        """What the cost model sees."""
        return [Chunk(segment.start, segment.length) for segment in self.segments]

    @property
    def sampled(self) -> list[BatchSegment]:
        """The segments that choose a token, in order."""
        return [segment for segment in self.segments if segment.sample]
