"""The receiver's ledger: what is delivered, revoked, acknowledged and fenced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kvcache.pool import PagePool, PageStateError
from penstock_runtime.transfer.ownership import Delivery, GrantLedger, UnknownGrantError

if TYPE_CHECKING:
    from random import Random

PAGE = 4
LINK = 3
WRITERS = ("stage-0/a", "stage-1/b")


class Receiver:
    """A pool of 16 pages, its ledger, and one request of `tokens` tokens."""

    def __init__(self, tokens: int, cached: int = 0) -> None:
        self.pool = PagePool(16, PAGE)
        self.ledger = GrantLedger(self.pool)
        self.pages = self.pool.allocate(-(-tokens // PAGE))
        self.grant = self.ledger.open(
            incarnation=LINK, writers=WRITERS, pages=self.pages, cached=cached, end=tokens
        )
        self.ledger.check()

    def deliver(self, stage: int, start: int, end: int) -> Delivery | None:
        delivery = self.ledger.delivered(LINK, self.grant, stage, start, end)
        self.ledger.check()
        return delivery

    def states(self) -> list[str]:
        return [self.pool.state(page) for page in self.pages]


def test_a_grant_is_complete_when_every_stage_announced_every_token() -> None:
    receiver = Receiver(10)
    assert receiver.states() == ["granted"] * 3
    assert receiver.deliver(0, 4, 10) == Delivery(0, complete=False)
    assert receiver.deliver(1, 0, 8) == Delivery(0, complete=False)
    assert receiver.deliver(0, 0, 4) == Delivery(8, complete=False)
    assert receiver.ledger.delivered_by_all(receiver.grant) == 8
    assert receiver.ledger.progress() == [(8, 10)]
    assert receiver.deliver(1, 8, 10) == Delivery(10, complete=True)
    assert receiver.states() == ["resident"] * 3
    assert not receiver.ledger.is_open(receiver.grant)
    assert receiver.ledger.progress() == []
    assert receiver.ledger.floor() == receiver.grant + 1
    receiver.pool.release(receiver.pages)
    assert receiver.pool.counts().free == 16


@pytest.mark.parametrize(
    ("incarnation", "shift", "stage", "start", "end", "reason"),
    [
        (LINK, 1, 0, 0, 4, "unknown grant"),
        (LINK, -1, 0, 0, 4, "unknown grant"),
        (LINK - 1, 0, 0, 0, 4, "other incarnation"),
        (LINK + 1, 0, 0, 0, 4, "other incarnation"),
        (LINK, 0, 2, 0, 4, "unknown stage"),
        (LINK, 0, -1, 0, 4, "unknown stage"),
        (LINK, 0, 0, 0, 9, "outside of the grant"),
        (LINK, 0, 0, -4, 4, "outside of the grant"),
        (LINK, 0, 0, 4, 4, "outside of the grant"),
        (LINK, 0, 1, 2, 6, "repeated range"),
    ],
)
def test_foreign_announcements_are_dropped_and_counted(
    incarnation: int, shift: int, stage: int, start: int, end: int, reason: str
) -> None:
    receiver = Receiver(8)
    receiver.deliver(1, 0, 4)
    grant = receiver.grant + shift
    assert receiver.ledger.delivered(incarnation, grant, stage, start, end) is None
    assert receiver.ledger.dropped == {reason: 1}
    assert receiver.ledger.delivered_by_all(receiver.grant) == 0


def test_a_revocation_keeps_full_delivered_pages_and_quarantines_the_rest() -> None:
    receiver = Receiver(16)
    receiver.deliver(0, 0, 12)
    receiver.deliver(1, 0, 10)
    revocation = receiver.ledger.revoke(receiver.grant)
    assert (revocation.tokens, revocation.pages) == (8, tuple(receiver.pages[:2]))
    assert revocation.writers == {0, 1}
    assert receiver.states() == ["resident", "resident", "quarantined", "quarantined"]
    assert receiver.deliver(1, 10, 16) is None
    assert receiver.ledger.quarantined(LINK) == [receiver.grant]
    assert receiver.ledger.floor() == receiver.grant

    assert not receiver.ledger.acknowledged(receiver.grant, 0, WRITERS[0])
    assert receiver.ledger.awaited(receiver.grant) == {1}
    assert not receiver.ledger.acknowledged(receiver.grant, 1, "stage-1/successor")
    assert not receiver.ledger.acknowledged(receiver.grant, 0, WRITERS[0])
    assert receiver.ledger.dropped["foreign acknowledgement"] == 2
    assert receiver.ledger.acknowledged(receiver.grant, 1, WRITERS[1])
    assert receiver.states() == ["resident", "resident", "free", "free"]
    receiver.ledger.check()
    with pytest.raises(UnknownGrantError):
        receiver.ledger.revoke(receiver.grant)


def test_the_prefix_is_kept_until_nobody_can_read_it() -> None:
    receiver = Receiver(12, cached=6)
    assert receiver.states() == ["resident", "granted", "granted"]
    # A stage may announce the partly cached page as a whole.
    receiver.deliver(0, 4, 8)
    receiver.deliver(1, 6, 8)
    revocation = receiver.ledger.revoke(receiver.grant)
    assert revocation.tokens == 8
    receiver.pool.release(revocation.pages)
    assert receiver.states() == ["resident", "free", "quarantined"]
    for stage, writer in enumerate(WRITERS):
        receiver.ledger.acknowledged(receiver.grant, stage, writer)
    assert receiver.pool.counts().free == 16


def test_a_partly_cached_page_is_lost_with_its_grant() -> None:
    receiver = Receiver(12, cached=6)
    assert receiver.ledger.delivered_by_all(receiver.grant) == 6
    assert receiver.ledger.revoke(receiver.grant).tokens == 4
    assert receiver.states() == ["resident", "quarantined", "quarantined"]


def test_a_completed_grant_releases_the_prefix_that_it_lent() -> None:
    receiver = Receiver(12, cached=8)
    receiver.pool.release(receiver.pages[:2])
    receiver.deliver(0, 8, 12)
    assert receiver.states() == ["resident", "resident", "granted"]
    receiver.deliver(1, 8, 12)
    assert receiver.states() == ["free", "free", "resident"]


def test_a_fence_settles_its_incarnation_and_no_other() -> None:
    receiver = Receiver(8)
    ledger, pool = receiver.ledger, receiver.pool
    revoked, other = pool.allocate(2), pool.allocate(2)
    second = ledger.open(incarnation=LINK, writers=WRITERS, pages=revoked, cached=0, end=8)
    third = ledger.open(incarnation=9, writers=("x/1",), pages=other, cached=0, end=8)
    ledger.revoke(second)
    receiver.deliver(0, 0, 8)
    receiver.deliver(1, 0, 5)
    assert ledger.open_grants(LINK) == [receiver.grant]
    (cut,) = ledger.fenced(LINK)
    assert (cut.grant, cut.tokens, cut.pages) == (receiver.grant, 4, tuple(receiver.pages[:1]))
    assert cut.writers == frozenset()
    assert receiver.states() == ["resident", "free"]
    assert [pool.state(page) for page in revoked] == ["free", "free"]
    assert ledger.is_open(third)
    assert ledger.floor() == third
    assert ledger.fenced(LINK) == []
    ledger.check()


def test_an_incarnation_belongs_to_one_process_a_stage() -> None:
    receiver = Receiver(4)
    pages = receiver.pool.allocate(1)
    successors = (WRITERS[0], "stage-1/successor")
    with pytest.raises(ValueError, match="fence it"):
        receiver.ledger.open(incarnation=LINK, writers=successors, pages=pages, cached=0, end=4)
    receiver.ledger.fenced(LINK)
    receiver.ledger.open(incarnation=LINK + 1, writers=successors, pages=pages, cached=0, end=4)
    receiver.ledger.check()


def test_impossible_grants_are_refused_and_change_nothing() -> None:
    receiver = Receiver(4)
    pool, ledger = receiver.pool, receiver.ledger
    pages = pool.allocate(3)
    for cached, end, some in ((0, 0, pages), (8, 8, pages), (0, 13, pages), (-1, 4, pages)):
        with pytest.raises(ValueError, match="cannot take"):
            ledger.open(incarnation=LINK, writers=WRITERS, pages=some, cached=cached, end=end)
    pool.commit(pages[2], b"block", b"root")
    before = pool.counts()
    with pytest.raises(PageStateError):
        ledger.open(incarnation=LINK, writers=WRITERS, pages=pages, cached=4, end=12)
    assert pool.counts() == before
    pool.release(pages)
    ledger.check()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    cached=st.integers(0, 39),
    cut=st.integers(0, 20),
    random=st.randoms(use_true_random=False),
    fence=st.booleans(),
)
def test_whatever_is_kept_was_announced_by_all(
    tokens: int, cached: int, cut: int, random: Random, fence: bool
) -> None:
    """Announce chunks in any order up to a random moment, then end the grant."""
    receiver = Receiver(tokens, min(cached, tokens - 1))
    chunks = [
        (stage, start, min(start + 3, tokens))
        for stage in range(len(WRITERS))
        for start in range(min(cached, tokens - 1), tokens, 3)
    ]
    random.shuffle(chunks)
    announced = {stage: set(range(min(cached, tokens - 1))) for stage in range(len(WRITERS))}
    for stage, start, end in chunks[:cut]:
        receiver.deliver(stage, start, end)
        announced[stage] |= set(range(start, end))
    everywhere = set.intersection(*announced.values())
    if not receiver.ledger.is_open(receiver.grant):
        assert everywhere == set(range(tokens))
        return
    if fence:
        (kept,) = receiver.ledger.fenced(LINK)
    else:
        kept = receiver.ledger.revoke(receiver.grant)
        for stage, writer in enumerate(WRITERS):
            receiver.ledger.acknowledged(receiver.grant, stage, writer)
    assert set(range(kept.tokens)) <= everywhere
    missing = next(t for t in range(tokens + 1) if t not in everywhere)
    assert missing - kept.tokens < PAGE
    assert kept.pages == tuple(receiver.pages[: kept.tokens // PAGE])
    receiver.pool.release(kept.pages)
    receiver.ledger.check()
    assert receiver.pool.counts().free == 16
