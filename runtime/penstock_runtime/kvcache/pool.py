"""The page pool: the one owner of the page ids of a worker. Pure; no memory is touched here.

Every page is in exactly one state:

    free ──allocate──► resident ──grant──► granted ──deliver──► resident
     ▲                  │    ▲                │
     │               release acquire      quarantine
     │                  ▼    │                ▼
     ├──────evict──── cached             quarantined ──settle──► free
     └──release (without a block)

free         nobody's.
resident     held by one or more requests; may also be shared through the prefix cache.
cached       held by no request, keeps a block that can be matched, may be evicted.
granted      a remote group may write it; nobody here reads it. One holder.
quarantined  nobody here will read it, somebody remote may still write it.

So free + resident + cached + granted + quarantined = total, always. Who may write a granted or
quarantined page, and when that ends, is the business of `transfer.ownership`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.prefix_cache import Block, PrefixCache

if TYPE_CHECKING:
    from collections.abc import Sequence


class PoolExhausted(Exception):  # noqa: N818 - it names the event
    """Fewer pages are free or cached than asked for. Nothing was allocated."""


class PageStateError(Exception):
    """A page is not in the state that the operation needs: a bug in the caller."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state."""

    free: int
    resident: int
    cached: int
    granted: int
    quarantined: int
    total: int


class PagePool:
    """Pages [0, pages) of `page_size` tokens each. Not thread-safe: one owner, the event loop.

    Every method that takes several pages checks all of them first: it changes all or none, and
    raises PageStateError naming the page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {pages} pages of {page_size} tokens holds nothing")
        self.total = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        """A stack; the lowest ids come out first, neighbours merge in a transfer."""
        self._references: dict[int, int] = {}
        """Resident pages → how many times requests hold them."""
        self._granted: set[int] = set()
        self._quarantined: set[int] = set()
        self._cache = PrefixCache()

    # --- what requests do ---------------------------------------------------------------------

    def available(self) -> int:
        """Return how many pages `allocate` can give: free and cached ones."""
        return len(self._free) + self._cache.idle

    def allocate(self, n: int) -> list[int]:
        """Return n pages, each held once, in rising order; evicts cached pages as needed.

        Raises PoolExhausted, and changes nothing, if fewer than n are available.
        """
        if n > self.available():
            raise PoolExhausted(
                f"{n} pages asked for, {len(self._free)} free and {self._cache.idle} cached "
                f"of {self.total}"
            )
        while len(self._free) < n:
            self._free.append(self._cache.evict())
        pages = sorted(self._free.pop() for _ in range(n))
        self._references.update(dict.fromkeys(pages, 1))
        return pages

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest cached prefix. `acquire` them before anything else."""
        return self._cache.match(hashes)

    def acquire(self, pages: Sequence[int]) -> None:
        """Hold these cached or resident pages once more."""
        for page in pages:
            if page not in self._references and not self._cache.is_idle(page):
                raise PageStateError(f"page {page} is {self.state(page)}, it cannot be shared")
        for page in pages:
            if page not in self._references:
                self._cache.hold(page)
            self._references[page] = self._references.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        """Give one hold of each page back. Pages nobody holds become cached if they keep a block.

        Give a sequence's pages in their order: its end is then forgotten before its start.
        """
        for page, holds in Counter(pages).items():
            if self._references.get(page, 0) < holds:
                raise PageStateError(f"page {page} is {self.state(page)}, not held {holds} times")
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            del self._references[page]
            if self._cache.holds(page):
                self._cache.let_go(page)
            else:
                self._free.append(page)

    def commit(self, page: int, block_hash: bytes, parent: bytes) -> int:
        """A held, full page can now be found under its block's hash.

        Args:
            page: A resident page whose KV is complete and will not change while it is held.
            block_hash: The block's hash, see `penstock_wire.blocks`.
            parent: The hash of the block before it, or the root hash.

        Returns:
            The page that holds the block in the cache. If an earlier page already does, it stays,
            and `page` will be freed at its release.
        """
        if page not in self._references:
            raise PageStateError(f"page {page} is {self.state(page)}, only a held one is committed")
        kept = self._cache.match([block_hash])
        if kept != [page] and self._cache.holds(page):
            raise PageStateError(f"page {page} already holds another block")
        return self._cache.store(page, Block(block_hash, parent))

    # --- what the grant ledger does -----------------------------------------------------------

    def grant(self, pages: Sequence[int]) -> None:
        """Resident → granted. Only pages held once and without a block: nobody else reads them."""
        if len(set(pages)) != len(pages):
            raise PageStateError("a page is granted twice")
        for page in pages:
            if self._references.get(page) != 1 or self._cache.holds(page):
                raise PageStateError(f"page {page} is {self.state(page)}, or others may read it")
        for page in pages:
            del self._references[page]
        self._granted.update(pages)

    def deliver(self, pages: Sequence[int]) -> None:
        """Granted → resident, held once: every byte was announced by its writer."""
        self._leave("granted", self._granted, pages)
        self._references.update(dict.fromkeys(pages, 1))

    def quarantine(self, pages: Sequence[int]) -> None:
        """Granted → quarantined: nobody waits for the bytes, somebody may still write them."""
        self._leave("granted", self._granted, pages)
        self._quarantined.update(pages)

    def settle(self, pages: Sequence[int]) -> None:
        """Quarantined → free: it is certain that nobody writes these pages any more."""
        self._leave("quarantined", self._quarantined, pages)
        self._free.extend(sorted(pages, reverse=True))

    # --- the cache as others see it -----------------------------------------------------------

    def snapshot(self) -> list[bytes]:
        """Return the hashes of all blocks that can be matched."""
        return self._cache.hashes()

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes (stored, evicted) since the last call; no hash is in both."""
        return self._cache.drain_events()

    # --- looking ------------------------------------------------------------------------------

    def state(self, page: int) -> str:
        """Return the state of one page, for messages and tests. Raises PageStateError."""
        if not 0 <= page < self.total:
            raise PageStateError(f"page {page} is outside of the pool of {self.total} pages")
        if page in self._references:
            return "resident"
        if page in self._granted:
            return "granted"
        if page in self._quarantined:
            return "quarantined"
        return "cached" if self._cache.is_idle(page) else "free"

    def counts(self) -> PageCounts:
        """Return how many pages are in each state."""
        return PageCounts(
            free=len(self._free),
            resident=len(self._references),
            cached=self._cache.idle,
            granted=len(self._granted),
            quarantined=len(self._quarantined),
            total=self.total,
        )

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one state. Linear; for tests."""
        self._cache.check()
        idle = [page for page in range(self.total) if self._cache.is_idle(page)]
        everywhere = [*self._free, *self._references, *self._granted, *self._quarantined, *idle]
        assert sorted(everywhere) == list(range(self.total)), f"pages lost or doubled: {everywhere}"
        assert all(holds > 0 for holds in self._references.values())
        for page in range(self.total):
            if self._cache.holds(page):
                assert self.state(page) in {"resident", "cached"}

    def _leave(self, name: str, state: set[int], pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise PageStateError(f"a {name} page is named twice")
        for page in pages:
            if page not in state:
                raise PageStateError(f"page {page} is {self.state(page)}, not {name}")
        state.difference_update(pages)
