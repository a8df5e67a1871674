"""Sets of half-open token ranges, as chunks are posted or announced."""

from __future__ import annotations

from bisect import bisect_left


class Spans:
    """A set of tokens kept as disjoint half-open ranges, neighbours joined."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Add [start, end), or return False and change nothing if part of it is there already."""
        at = bisect_left(self._starts, start)
        before = at > 0 and self._ends[at - 1] > start
        behind = at < len(self._starts) and self._starts[at] < end
        if before or behind or start >= end:
            return False
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        if at > 0 and self._ends[at - 1] == start:
            self._ends[at - 1] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        return True

    def reach(self, start: int) -> int:
        """Return the first token at or after `start` that is missing."""
        at = bisect_left(self._starts, start + 1) - 1
        return max(start, self._ends[at]) if at >= 0 else start
