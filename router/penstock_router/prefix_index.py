"""Which worker holds the KV of which blocks, exactly as the workers told.

Every worker has one bit. A block's entry is the mask of the workers that hold it, so the longest
prefix of a prompt on every worker at once is one walk over its hashes with a bitwise and.

Blocks of a prompt that was just routed count as *predicted* for a short time: they are not there
yet, but the next sibling of a burst should follow the first one instead of computing the same
prefix elsewhere. Predictions live in two generations, so that old ones go without a scan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class PrefixIndex:
    """Maps block hashes to the workers that hold them.

    The size is bounded by the sum of the workers' capacities, plus `max_predicted` entries.

    Args:
        clock: monotonic time in seconds.
        predicted_seconds: a prediction counts at least this long, and at most twice as long. A few
            seconds: the time from routing a prompt until its blocks are reported.
        max_predicted: predictions a generation; more end the generation early.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        predicted_seconds: float = 4.0,
        max_predicted: int = 100_000,
    ) -> None:
        self._clock = clock
        self._predicted_seconds = predicted_seconds
        self._max_predicted = max_predicted
        self._masks: dict[bytes, int] = {}
        self._blocks: dict[str, set[bytes]] = {}
        self._bits: dict[str, int] = {}
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._generation_end = clock() + predicted_seconds

    def __len__(self) -> int:
        """Return the number of different blocks that workers hold."""
        return len(self._masks)

    def blocks_of(self, worker: str) -> int:
        """Return how many blocks `worker` holds."""
        return len(self._blocks.get(worker, ()))

    def replace(self, worker: str, hashes: Iterable[bytes], capacity: int) -> bool:
        """Set all that `worker` holds; returns False if that is more than `capacity` blocks.

        What is over the capacity is left out: a worker cannot make the router grow without bound.
        """
        self.drop(worker)
        return self.update(worker, hashes, (), capacity)

    def update(
        self, worker: str, stored: Iterable[bytes], evicted: Iterable[bytes], capacity: int
    ) -> bool:
        """Apply one event; returns False if `worker` would hold more than `capacity` blocks."""
        bit = self._bit(worker)
        blocks = self._blocks[worker]
        for name in evicted:
            if name in blocks:
                blocks.remove(name)
                self._clear(name, bit)
        for name in stored:
            if name in blocks:
                continue
            if len(blocks) >= capacity:
                return False
            blocks.add(name)
            self._masks[name] = self._masks.get(name, 0) | bit
        return True

    def drop(self, worker: str) -> None:
        """Forget all about `worker`, predictions too."""
        bit = self._bits.pop(worker, None)
        if bit is None:
            return
        for name in self._blocks.pop(worker):
            self._clear(name, bit)
        self._young = _without(self._young, bit)
        self._old = _without(self._old, bit)

    def predict(self, worker: str, hashes: Iterable[bytes]) -> None:
        """Count these blocks as held by `worker` for a short time."""
        self._turn()
        bit = self._bit(worker)
        for name in hashes:
            if len(self._young) >= self._max_predicted:
                self._next_generation()
            self._young[name] = self._young.get(name, 0) | bit

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Return for each worker how many blocks at the start of `hashes` it holds.

        Workers that hold none are left out. Predicted blocks count.
        """
        self._turn()
        found: dict[str, int] = {}
        masks, young, old = self._masks, self._young, self._old
        alive = -1
        depth = 0
        for name in hashes:
            held = masks.get(name, 0) | young.get(name, 0) | old.get(name, 0)
            still = alive & held
            if still != alive:
                if depth:
                    self._collect(alive & ~held, depth, found)
                alive = still
            if not alive:
                return found
            depth += 1
        if depth:
            self._collect(alive, depth, found)
        return found

    def _collect(self, mask: int, depth: int, found: dict[str, int]) -> None:
        for worker, bit in self._bits.items():
            if bit & mask:
                found[worker] = depth

    def _bit(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            taken = 0
            for other in self._bits.values():
                taken |= other
            bit = ~taken & (taken + 1)  # the lowest bit that is free
            self._bits[worker] = bit
            self._blocks[worker] = set()
        return bit

    def _clear(self, name: bytes, bit: int) -> None:
        left = self._masks[name] & ~bit
        if left:
            self._masks[name] = left
        else:
            del self._masks[name]

    def _turn(self) -> None:
        now = self._clock()
        if now >= self._generation_end + self._predicted_seconds:
            self._young = {}
        if now >= self._generation_end:
            self._next_generation()

    def _next_generation(self) -> None:
        self._old = self._young
        self._young = {}
        self._generation_end = self._clock() + self._predicted_seconds


def _without(masks: dict[bytes, int], bit: int) -> dict[bytes, int]:
    return {name: left for name, mask in masks.items() if (left := mask & ~bit)}
