"""What the schedulers need of a page pool, and the blocks that are being computed right now."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Pages(Protocol):
    """The part of `kvcache.pool.PagePool` that a scheduler uses."""

    page_size: int
    """Tokens a page."""
    total: int

    def available(self) -> int:
        """Return how many pages `allocate` can give."""

    def allocate(self, n: int) -> list[int]:
        """Return n pages, each held once; evicts cached ones. The schedulers ask first."""

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest cached prefix of these blocks, not yet held."""

    def acquire(self, pages: Sequence[int]) -> None:
        """Hold cached or resident pages once more."""

    def release(self, pages: Sequence[int]) -> None:
        """Give one hold of each page back; what keeps a block stays matchable until evicted."""

    def commit(self, page: int, block_hash: bytes, parent: bytes) -> int:
        """Make a held, full page matchable; returns the page that keeps the block."""


class BlocksUnderway:
    """Blocks that admitted requests have yet to compute.

    A request that waits, and whose next block is underway, is better off waiting for it than
    computing it a second time: bursts with one system prompt, and the n choices of one request,
    are computed once.
    """

    def __init__(self) -> None:
        self._count: Counter[bytes] = Counter()

    def __bool__(self) -> bool:
        return bool(self._count)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._count

    def add(self, hashes: Iterable[bytes]) -> None:
        """A request that is admitted will compute these."""
        self._count.update(hashes)

    def remove(self, hashes: Iterable[bytes]) -> None:
        """They are computed, or the request ended without them."""
        for block_hash in hashes:
            self._count[block_hash] -= 1
            if not self._count[block_hash]:
                del self._count[block_hash]


def reserve(pool: Pages, matched: Sequence[int], fresh: int, spare: int = 0) -> list[int] | None:
    """Hold the matched pages and allocate `fresh` more behind them, or change nothing.

    Returns None unless `fresh + spare` pages are available besides the matched ones.
    """
    # Held first: the allocation could otherwise evict the very pages that were matched.
    pool.acquire(matched)
    if pool.available() < fresh + spare:
        pool.release(matched)
        return None
    return [*matched, *pool.allocate(fresh)]
