"""Virtual time: what is due next, and nothing else."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """Calls functions in the order of their times; at one time, in the order they were given."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._given = 0

    def at(self, time: float, function: Callable[..., None], *args: object) -> None:
        """Call function(*args) at `time`. Raises ValueError if that is past, or no time."""
        if not self.now <= time < math.inf:
            raise ValueError(f"it is {self.now}: nothing can be done at {time}")
        heapq.heappush(self._due, (time, self._given, function, args))
        self._given += 1

    def run(self) -> None:
        """Go on until nothing is due."""
        while self._due:
            self.now, _, function, args = heapq.heappop(self._due)
            function(*args)
