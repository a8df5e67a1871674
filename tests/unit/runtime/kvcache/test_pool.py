"""The page pool loses no page, and shares and evicts as it says."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock_runtime.kvcache.pool import PagePool, PageStateError, PoolExhausted

ROOT = b"root"


def chain(name: str, n: int) -> list[bytes]:
    """Return the block hashes of a sequence: equal prefixes of names have equal hashes."""
    return [f"{name}{position}".encode() for position in range(n)]


def stored(pool: PagePool, hashes: list[bytes]) -> list[int]:
    """Let a request compute and commit these blocks and end; return its pages."""
    pages = pool.allocate(len(hashes))
    commit(pool, pages, hashes)
    pool.release(pages)
    return pages


def commit(pool: PagePool, pages: list[int], hashes: list[bytes]) -> None:
    parents = [ROOT, *hashes]
    for page, block, parent in zip(pages, hashes, parents, strict=False):
        pool.commit(page, block, parent)


def test_a_new_pool_gives_neighbouring_pages() -> None:
    pool = PagePool(8, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(5) == [3, 4, 5, 6, 7]


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(4, 16)
    stored(pool, chain("a", 2))
    before = pool.counts()
    with pytest.raises(PoolExhausted, match="5 pages asked for, 2 free and 2 cached of 4"):
        pool.allocate(5)
    assert pool.counts() == before
    assert len(pool.match(chain("a", 2))) == 2


def test_a_released_chain_is_matched_and_shared() -> None:
    pool = PagePool(8, 16)
    pages = stored(pool, chain("a", 3))
    assert pool.counts().cached == 3
    found = pool.match([*chain("a", 2), b"other"])
    assert found == pages[:2]
    pool.acquire(found)
    pool.acquire(found)
    pool.release(found)
    assert [pool.state(page) for page in pages] == ["resident", "resident", "cached"]
    pool.release(found)
    assert pool.counts().cached == 3


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = PagePool(4, 16)
    pages = stored(pool, chain("a", 4))
    for left in (3, 2, 1):
        pool.allocate(1)
        assert pool.match(chain("a", 4)) == pages[:left]


def test_the_least_recently_used_chain_goes_first() -> None:
    pool = PagePool(4, 16)
    old, new = stored(pool, chain("a", 2)), stored(pool, chain("b", 2))
    pool.acquire(pool.match(chain("a", 2)))
    pool.release(old)
    assert sorted(pool.allocate(2)) == sorted(new)
    assert pool.match(chain("a", 2)) == old


def test_a_prefix_used_by_a_longer_chain_stays_as_long_as_that() -> None:
    """Two requests compute the same block at once: the second's chain hangs on the first's page."""
    pool = PagePool(4, 16)
    first, second = pool.allocate(1), pool.allocate(2)
    hashes = chain("a", 2)
    assert pool.commit(first[0], hashes[0], ROOT) == first[0]
    assert pool.commit(second[0], hashes[0], ROOT) == first[0]
    assert pool.commit(second[1], hashes[1], hashes[0]) == second[1]
    pool.release(first)
    stored(pool, [b"x"])
    pool.release(second)
    assert pool.match(hashes) == [first[0], second[1]]
    pool.allocate(pool.counts().free + 1)
    assert pool.match([b"x"]) == []
    assert pool.match(hashes) == [first[0], second[1]]
    pool.allocate(1)
    assert pool.match(hashes) == [first[0]]


def test_a_block_whose_child_is_held_goes_last_but_can_go() -> None:
    pool = PagePool(3, 16)
    first, second = pool.allocate(1), pool.allocate(2)
    hashes = chain("a", 2)
    pool.commit(first[0], hashes[0], ROOT)
    pool.commit(second[1], hashes[1], hashes[0])
    pool.release(first)
    assert pool.allocate(1) == first
    assert pool.match(hashes) == []
    pool.check()


def test_events_tell_the_difference_since_the_last_ones() -> None:
    pool = PagePool(2, 16)
    stored(pool, chain("a", 2))
    assert pool.drain_events() == (chain("a", 2), [])
    stored(pool, chain("b", 1))
    assert pool.drain_events() == (chain("b", 1), [b"a1"])
    # Stored and evicted again between two looks: nobody needs to hear of it.
    stored(pool, chain("c", 1))
    pool.release(pool.allocate(2))
    stored_since, evicted = pool.drain_events()
    assert (stored_since, sorted(evicted)) == ([], [b"a0", b"b0"])
    assert pool.snapshot() == []


def test_a_grants_way() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(4)
    pool.grant(pages)
    pool.deliver(pages[:1])
    pool.quarantine(pages[1:])
    assert [pool.state(page) for page in pages] == ["resident", *["quarantined"] * 3]
    assert pool.available() == 0
    pool.settle(pages[1:])
    pool.release(pages[:1])
    assert pool.counts().free == 4
    pool.check()


def test_wrong_transitions_are_refused_and_change_nothing() -> None:
    pool = PagePool(4, 16)
    a, b, shared, granted = pool.allocate(4)
    pool.commit(a, b"a", ROOT)
    pool.acquire([shared])
    pool.grant([granted])
    before = pool.counts()
    for operation, pages in (
        (pool.grant, [b, a]),  # a can be found by others
        (pool.grant, [b, shared]),
        (pool.grant, [b, b]),
        (pool.release, [b, b]),
        (pool.release, [granted]),
        (pool.acquire, [b, granted]),
        (pool.deliver, [b]),
        (pool.deliver, [granted, granted]),
        (pool.quarantine, [b]),
        (pool.settle, [granted]),
        (pool.release, [4]),
    ):
        with pytest.raises(PageStateError):
            operation(pages)
        assert pool.counts() == before
    with pytest.raises(PageStateError, match="only a held one"):
        pool.commit(granted, b"g", b"a")
    with pytest.raises(PageStateError, match="another block"):
        pool.commit(a, b"other", ROOT)
    pool.check()


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        PagePool(0, 16)


class PoolMachine(RuleBasedStateMachine):
    """Requests over a small pool, with prefixes that often coincide.

    A request holds pages whose first blocks are committed; the model is the list of requests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 4)
        self.requests: list[tuple[list[bytes], list[int]]] = []
        self.granted: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.hashes: set[bytes] = set()

    @rule(sequence=st.lists(st.sampled_from("ab"), min_size=1, max_size=5))
    def start(self, sequence: list[str]) -> None:
        """A prompt arrives: share what is cached, compute and commit the rest."""
        hashes = ["".join(sequence[: n + 1]).encode() for n in range(len(sequence))]
        found = self.pool.match(hashes)
        self.pool.acquire(found)
        try:
            fresh = self.pool.allocate(len(hashes) - len(found))
        except PoolExhausted:
            assert self.pool.available() < len(hashes) - len(found)
            self.pool.release(found)
            return
        pages = found + fresh
        assert len(set(pages)) == len(pages)
        others = {page for _, held in self.requests for page in held}
        assert not others & set(fresh)
        commit(self.pool, pages, hashes)
        assert self.pool.match(hashes) == pages
        self.requests.append((hashes, pages))

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, 100))
    def finish(self, choice: int) -> None:
        hashes, pages = self.requests.pop(choice % len(self.requests))
        self.pool.release(pages)
        assert self.pool.match(hashes) == pages

    @rule(n=st.integers(1, 3))
    def grant(self, n: int) -> None:
        if self.pool.available() >= n:
            pages = self.pool.allocate(n)
            self.pool.grant(pages)
            self.granted.append(pages)

    @precondition(lambda self: self.granted)
    @rule(kept=st.integers(0, 3))
    def revoke(self, kept: int) -> None:
        pages = self.granted.pop()
        self.pool.deliver(pages[:kept])
        self.pool.quarantine(pages[kept:])
        self.pool.release(pages[:kept])
        self.quarantined.append(pages[kept:])

    @precondition(lambda self: self.quarantined)
    @rule()
    def settle(self) -> None:
        self.pool.settle(self.quarantined.pop())

    @rule()
    def events(self) -> None:
        new, gone = self.pool.drain_events()
        assert not self.hashes & set(new)
        assert set(gone) <= self.hashes
        self.hashes = (self.hashes | set(new)) - set(gone)
        assert self.hashes == set(self.pool.snapshot())

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        counts = self.pool.counts()
        held = {page for _, pages in self.requests for page in pages}
        assert counts.resident == len(held)
        assert counts.granted == sum(map(len, self.granted))
        assert counts.quarantined == sum(map(len, self.quarantined))
        states = (counts.free, counts.resident, counts.cached, counts.granted, counts.quarantined)
        assert sum(states) == counts.total == 12

    @invariant()
    def no_chain_is_broken(self) -> None:
        """Requests hold whole prefixes here, so every block's parent is known too."""
        for block in self.pool.snapshot():
            prefixes = [block[: n + 1] for n in range(len(block))]
            assert len(self.pool.match(prefixes)) == len(block)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestPoolMachine = PoolMachine.TestCase
