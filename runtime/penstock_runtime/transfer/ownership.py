"""The receiver's ledger of grants: which remote stage may write which page, and until when.

A page that a stage was allowed to write is read, or used for anything else, only when one of these
is certain:

delivered      every stage has announced every token of the page; announcements follow the bytes
               over the same path, and no stage writes a token twice.
acknowledged   after a revocation, this very process said that its writes are done and no more come.
fenced         the receiving agent was destroyed: nothing comes through it any more.

Nothing else ends a grant. A timeout says nothing about bytes; and a stage that was seen to die may
have left bytes in kernel buffers, which land later.

The pages of the prefix, which the stages may read, are kept just as long: were they reused, a stage
that still loads them would compute on, and cache, foreign KV.

Pure bookkeeping over page ids; time and messages are the caller's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.transfer.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.kvcache.pool import PagePool


class UnknownGrantError(Exception):
    """No such grant is open: it is complete, revoked, or never was."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What an announcement brought."""

    tokens: int
    """The KV of tokens [0, tokens) lies here."""
    complete: bool
    """The grant has ended: its pages are resident, held by the request."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """How a grant that was cut short leaves its pages."""

    grant: int
    tokens: int
    """The KV of tokens [0, tokens) lies here, in pages that the request holds: resume from it."""
    pages: tuple[int, ...]
    """The sequence's pages that hold those tokens. The rest of its pages are the request's no
    more."""
    writers: frozenset[int]
    """Stages whose RevokeAck is needed. Empty after a fence."""


@dataclass(slots=True)
class _Grant:
    incarnation: int
    writers: tuple[str, ...]
    pages: tuple[int, ...]
    """Of the whole sequence; those from `first` on are granted, those before it lent."""
    first: int
    cached: int
    end: int
    announced: list[Spans] = field(default_factory=list)

    @property
    def lent(self) -> tuple[int, ...]:
        return self.pages[: self.first]

    def tokens(self) -> int:
        """Tokens from 0 on that every stage has announced."""
        return min(spans.reach(self.cached) for spans in self.announced)


@dataclass(slots=True)
class _Quarantine:
    incarnation: int
    writers: dict[int, str]
    """Stages that have not acknowledged → the process that must."""
    pages: tuple[int, ...]
    lent: tuple[int, ...]


class GrantLedger:
    """All grants of one receiver, over all groups. Not thread-safe: the event loop owns it.

    Grant numbers rise for as long as the process lives. An incarnation names one receiving agent
    and the processes linked to it, one a stage. Incarnations rise too and are never used twice: a
    group's next agent gets a number that no group has had. A stage that restarts is linked to a new
    incarnation, after a fence: it may still be told of grants of its predecessor, whose pages it
    must not write.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._open: dict[int, _Grant] = {}
        self._quarantined: dict[int, _Quarantine] = {}
        self._next = 1
        self._linked: dict[int, tuple[str, ...]] = {}
        """Incarnations that had grants and were not fenced → their writers."""
        self.dropped: Counter[str] = Counter()
        """Announcements and acknowledgements that were ignored, by reason."""

    # --- a grant's life -----------------------------------------------------------------------

    def open(
        self,
        *,
        incarnation: int,
        writers: Sequence[str],
        pages: Sequence[int],
        cached: int,
        end: int,
    ) -> int:
        """Let a group write the KV of tokens [cached, end), and return the grant's number.

        Args:
            incarnation: The receiving agent that the group is linked to.
            writers: name/boot_id of each stage's process, in order of stages.
            pages: The sequence's pages in order, all held by the request. Those that contain
                tokens before `cached` only are lent for reading: the ledger holds them too.
            cached: Tokens whose KV lies here already.
            end: Tokens in all.

        Raises:
            ValueError: The range is empty, the pages do not hold it, or the incarnation belongs to
                other processes.
            PageStateError: A page to be granted is shared, or not held by the request.
        """
        size = self._pool.page_size
        if not writers or not 0 <= cached < end or len(pages) < pages_for(end, size):
            raise ValueError(
                f"{len(pages)} pages of {size} tokens and {len(writers)} stages cannot take "
                f"tokens [{cached}, {end})"
            )
        if self._linked.setdefault(incarnation, tuple(writers)) != tuple(writers):
            raise ValueError(
                f"incarnation {incarnation} is linked to {self._linked[incarnation]}, not to "
                f"{tuple(writers)}: fence it and link them anew"
            )
        used = tuple(pages[: pages_for(end, size)])
        grant = _Grant(incarnation, tuple(writers), used, cached // size, cached, end)
        grant.announced = [Spans() for _ in writers]
        self._pool.acquire(grant.lent)
        try:
            self._pool.grant(used[grant.first :])
        except Exception:
            self._pool.release(grant.lent)
            raise
        number = self._next
        self._next += 1
        self._open[number] = grant
        return number

    def delivered(
        self, incarnation: int, grant: int, stage: int, start: int, end: int
    ) -> Delivery | None:
        """A stage announced the KV of tokens [start, end).

        Returns None, and counts why, if the announcement is not about an open grant, or says
        nothing new. Chunks may be announced in any order.
        """
        entry = self._open.get(grant)
        reason = self._objection(entry, incarnation, stage, start, end)
        if entry is None or reason:
            self.dropped[reason] += 1
            return None
        if not entry.announced[stage].add(max(start, entry.cached), end):
            self.dropped["repeated range"] += 1
            return None
        tokens = entry.tokens()
        if tokens < entry.end:
            return Delivery(tokens, complete=False)
        del self._open[grant]
        self._pool.deliver(entry.pages[entry.first :])
        self._pool.release(entry.lent)
        return Delivery(tokens, complete=True)

    def revoke(self, grant: int) -> Revocation:
        """Take an open grant back. Full pages that all stages delivered become resident.

        The others are quarantined until every stage has acknowledged, or the agent was fenced.
        Raises UnknownGrantError.
        """
        entry = self._entry(grant)
        revocation, rest = self._cut(grant, frozenset(range(len(entry.writers))))
        self._pool.quarantine(rest)
        self._quarantined[grant] = _Quarantine(
            entry.incarnation, dict(enumerate(entry.writers)), rest, entry.lent
        )
        return revocation

    def acknowledged(self, grant: int, stage: int, writer: str) -> bool:
        """A stage's process will write nothing for this grant. Tell whether the grant has ended.

        Args:
            grant: A revoked grant.
            stage: The stage that says so.
            writer: name/boot_id of the process that said it. Only the one that held the grant can:
                its successor knows nothing of bytes that are still on their way.
        """
        entry = self._quarantined.get(grant)
        if entry is None or entry.writers.get(stage) != writer:
            self.dropped["foreign acknowledgement"] += 1
            return False
        del entry.writers[stage]
        if entry.writers:
            return False
        self._settle(grant)
        return True

    def fenced(self, incarnation: int) -> list[Revocation]:
        """This incarnation's agent was destroyed: settle all its grants.

        Returns what became of those that were still open: their requests go on from there.
        """
        self._linked.pop(incarnation, None)
        cut = []
        for grant, entry in list(self._open.items()):
            if entry.incarnation == incarnation:
                revocation, rest = self._cut(grant, frozenset())
                self._pool.quarantine(rest)
                self._pool.settle(rest)
                self._pool.release(entry.lent)
                cut.append(revocation)
        for grant, waiting in list(self._quarantined.items()):
            if waiting.incarnation == incarnation:
                self._settle(grant)
        return cut

    # --- looking, for messages and tests ------------------------------------------------------

    def delivered_by_all(self, grant: int) -> int:
        """Return how many tokens, from the first, lie here. Raises UnknownGrantError."""
        return self._entry(grant).tokens()

    def progress(self) -> list[tuple[int, int]]:
        """Return each open grant's tokens: how many, from the first, lie here; how many will."""
        return [(entry.tokens(), entry.end) for entry in self._open.values()]

    def is_open(self, grant: int) -> bool:
        """Tell whether stages may still write for this grant and are waited for."""
        return grant in self._open

    def open_grants(self, incarnation: int) -> list[int]:
        """Return the open grants of one agent."""
        return [g for g, entry in self._open.items() if entry.incarnation == incarnation]

    def awaited(self, grant: int) -> frozenset[int]:
        """Return the stages whose acknowledgement of this grant is missing."""
        entry = self._quarantined.get(grant)
        return frozenset(entry.writers) if entry is not None else frozenset()

    def floor(self) -> int:
        """Return the number below which every grant has ended for good."""
        return min([*self._open, *self._quarantined], default=self._next)

    def check(self) -> None:
        """Raise AssertionError unless ledger and pool agree on every page."""
        self._pool.check()
        granted = [page for entry in self._open.values() for page in entry.pages[entry.first :]]
        waiting = [page for entry in self._quarantined.values() for page in entry.pages]
        counts = self._pool.counts()
        assert (len(granted), len(waiting)) == (counts.granted, counts.quarantined)
        assert all(self._pool.state(page) == "granted" for page in granted)
        assert all(self._pool.state(page) == "quarantined" for page in waiting)
        lent = [page for entry in self._open.values() for page in entry.lent]
        lent += [page for entry in self._quarantined.values() for page in entry.lent]
        assert all(self._pool.state(page) == "resident" for page in lent)

    def quarantined(self, incarnation: int) -> list[int]:
        """Return the revoked grants of one agent that wait for acknowledgements."""
        return [g for g, entry in self._quarantined.items() if entry.incarnation == incarnation]

    # --- inside -------------------------------------------------------------------------------

    def _entry(self, grant: int) -> _Grant:
        entry = self._open.get(grant)
        if entry is None:
            raise UnknownGrantError(f"grant {grant} is not open")
        return entry

    def _objection(
        self, entry: _Grant | None, incarnation: int, stage: int, start: int, end: int
    ) -> str:
        if entry is None:
            return "unknown grant"
        if entry.incarnation != incarnation:
            return "other incarnation"
        if not 0 <= stage < len(entry.writers):
            return "unknown stage"
        if not entry.first * self._pool.page_size <= start < end <= entry.end:
            return "outside of the grant"
        return ""

    def _cut(self, grant: int, writers: frozenset[int]) -> tuple[Revocation, tuple[int, ...]]:
        """Close an open grant: make its full delivered pages resident, return the rest."""
        entry = self._open.pop(grant)
        full = max(entry.first, entry.tokens() // self._pool.page_size)
        self._pool.deliver(entry.pages[entry.first : full])
        tokens = full * self._pool.page_size
        return Revocation(grant, tokens, entry.pages[:full], writers), entry.pages[full:]

    def _settle(self, grant: int) -> None:
        entry = self._quarantined.pop(grant)
        self._pool.settle(entry.pages)
        self._pool.release(entry.lent)
