"""A stage's ledger: what may begin, what is still under way, what may be acknowledged."""

from __future__ import annotations

import pytest

from penstock_runtime.transfer.writer import GrantRevokedError, LinkDownError, WriterLedger

LINK = 5


def linked() -> WriterLedger:
    ledger = WriterLedger()
    ledger.link_opened(LINK)
    return ledger


def test_an_acknowledgement_waits_for_every_operation() -> None:
    ledger = linked()
    write = ledger.begin_write(1, LINK, 0, 4)
    read = ledger.begin_read(1, LINK)
    other = ledger.begin_write(2, LINK, 0, 4)
    ledger.revoke(1, floor=1)
    assert ledger.take_acknowledgements() == []
    ledger.done(write)
    assert ledger.busy(1)
    assert ledger.take_acknowledgements() == []
    ledger.done(read)
    assert not ledger.busy(1)
    assert ledger.take_acknowledgements() == [1]
    assert ledger.take_acknowledgements() == []
    assert ledger.in_flight() == 1
    ledger.done(other)


def test_a_revoked_grant_begins_nothing_even_if_it_comes_later() -> None:
    ledger = linked()
    ledger.revoke(7, floor=6)
    assert ledger.take_acknowledgements() == [7]
    with pytest.raises(GrantRevokedError):
        ledger.begin_write(7, LINK, 0, 4)
    with pytest.raises(GrantRevokedError):
        ledger.begin_read(7, LINK)
    # Below the floor everything has ended, whether its revocation came or not.
    assert ledger.ended(5)
    with pytest.raises(GrantRevokedError):
        ledger.begin_write(5, LINK, 0, 4)
    ledger.begin_write(6, LINK, 0, 4)


def test_a_repeated_revocation_is_acknowledged_again() -> None:
    ledger = linked()
    ledger.revoke(1, floor=1)
    assert ledger.take_acknowledgements() == [1]
    ledger.revoke(1, floor=1)
    assert ledger.take_acknowledgements() == [1]


def test_after_a_failed_write_there_is_no_acknowledgement() -> None:
    ledger = linked()
    lost, safe = ledger.begin_write(1, LINK, 0, 4), ledger.begin_write(2, LINK, 0, 4)
    ledger.failed(lost)
    ledger.done(safe)
    assert ledger.is_down(LINK)
    assert not ledger.busy(1)
    ledger.revoke(1, floor=1)
    ledger.revoke(2, floor=1)
    assert ledger.take_acknowledgements() == [2]
    with pytest.raises(LinkDownError):
        ledger.begin_write(3, LINK, 0, 4)


def test_a_failed_read_leaves_nothing_at_the_receiver() -> None:
    ledger = linked()
    ledger.failed(ledger.begin_read(1, LINK))
    ledger.revoke(1, floor=1)
    assert ledger.is_down(LINK)
    assert ledger.take_acknowledgements() == [1]


def test_after_a_deadline_pages_are_busy_until_the_own_fence() -> None:
    ledger = linked()
    ledger.begin_write(1, LINK, 0, 4)
    assert ledger.busy(1)
    ledger.fenced()
    assert not ledger.busy(1)
    assert ledger.is_down(LINK)
    ledger.revoke(1, floor=1)
    assert ledger.take_acknowledgements() == []


def test_a_new_incarnation_ends_the_old_ones_doubts() -> None:
    ledger = linked()
    ledger.failed(ledger.begin_write(1, LINK, 0, 4))
    slow = ledger.begin_write(2, LINK, 0, 4) if not ledger.is_down(LINK) else None
    assert slow is None
    ledger.link_opened(LINK + 1)
    assert not ledger.is_down(LINK + 1)
    assert ledger.is_down(LINK)
    ledger.begin_write(3, LINK + 1, 0, 4)
    assert sorted(ledger._entries) == [3]
    ledger.link_opened(LINK)
    assert not ledger.is_down(LINK + 1)


def test_a_link_that_was_never_opened_is_down() -> None:
    with pytest.raises(LinkDownError):
        WriterLedger().begin_write(1, LINK, 0, 4)


def test_a_ledger_without_a_link_speaks_for_nobody() -> None:
    ledger = WriterLedger()
    ledger.revoke(1, floor=1)
    assert ledger.take_acknowledgements() == []
    # A new incarnation follows a fence: nothing of an older grant is on its way any more.
    ledger.link_opened(LINK)
    assert ledger.take_acknowledgements() == [1]


def test_no_token_is_written_twice() -> None:
    ledger = linked()
    ledger.done(ledger.begin_write(1, LINK, 0, 4))
    with pytest.raises(ValueError, match="before"):
        ledger.begin_write(1, LINK, 3, 8)
    ledger.begin_write(1, LINK, 4, 8)


def test_what_has_ended_is_forgotten() -> None:
    ledger = linked()
    for grant in range(1, 100):
        operation = ledger.begin_write(grant, LINK, 0, 4)
        ledger.finish(grant)
        ledger.done(operation)
    assert ledger._entries == {}
    late = ledger.begin_write(100, LINK, 0, 4)
    for grant in range(101, 200):
        ledger.done(ledger.begin_write(grant, LINK, 0, 4))
        ledger.revoke(grant, floor=grant)
        ledger.take_acknowledgements()
    # Grant 100 is below the floor, but its pages here are not free yet.
    assert ledger.busy(100)
    assert sorted(ledger._entries) == [100, 199]
    assert ledger._revoked == {199}
    ledger.done(late)
    assert sorted(ledger._entries) == [199]
