"""A stage's ledger of its own reads and writes for one receiver's grants.

It answers four questions: may this operation begin, are this grant's pages still touched by an
operation, may a revocation be acknowledged, and has the link to the receiver gone bad.

An acknowledgement promises that no byte of this grant is on its way. So it is given only when every
write that was begun is *done*: the receiver's agent has taken the bytes. A write that failed, or
was cut by this process's own fence, may have left bytes in kernel buffers; its grant is never
acknowledged, the stage says LinkFailed instead, and the receiver fences.

Pure bookkeeping; one ledger a receiver (name/boot_id).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock_runtime.transfer.spans import Spans


class GrantRevokedError(Exception):
    """The receiver took this grant back: nothing more is read or written for it."""


class LinkDownError(Exception):
    """The receiver's agent of this incarnation cannot be reached any more."""


@dataclass(frozen=True, slots=True, eq=False)
class LinkOperation:
    """One read or write under way. Compared by identity."""

    grant: int
    incarnation: int
    is_write: bool


@dataclass(slots=True)
class _Entry:
    incarnation: int
    posted: Spans = field(default_factory=Spans)
    under_way: set[LinkOperation] = field(default_factory=set)
    uncertain: bool = False
    """A write ended without certainty where its bytes are."""
    finished: bool = False
    """The stage begins nothing more for it."""


class WriterLedger:
    """The operations of this stage for one receiver. Not thread-safe: the event loop owns it.

    A grant belongs to one incarnation of the receiver's agent; incarnations rise. A process serves
    only grants of the incarnation that was opened to it, never those of its predecessor. A stage is
    told of a grant once, never again.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._revoked: set[int] = set()
        self._unanswered: set[int] = set()
        """Revoked grants whose acknowledgement has not been taken."""
        self._floor = 0
        self._link = 0
        """The incarnation that the receiver opened last, from 1 on; 0: none yet."""
        self._broken = False
        """It failed here."""

    # --- operations ---------------------------------------------------------------------------

    def begin_write(self, grant: int, incarnation: int, start: int, end: int) -> LinkOperation:
        """Enter a write of the KV of tokens [start, end), before it is posted.

        Raises GrantRevokedError, LinkDownError, or ValueError if part of it was written before: a
        second write could land after the receiver read what the first one announced.
        """
        entry = self._enter(grant, incarnation)
        if not entry.posted.add(start, end):
            raise ValueError(f"tokens [{start}, {end}) of grant {grant} were written before")
        return _begin(entry, LinkOperation(grant, incarnation, is_write=True))

    def begin_read(self, grant: int, incarnation: int) -> LinkOperation:
        """Enter a read of the receiver's pages. Raises GrantRevokedError, LinkDownError."""
        entry = self._enter(grant, incarnation)
        return _begin(entry, LinkOperation(grant, incarnation, is_write=False))

    def done(self, operation: LinkOperation) -> None:
        """The operation is done: the bytes lie where they should."""
        self._end(operation)

    def failed(self, operation: LinkOperation) -> None:
        """The operation failed with a lost peer: it touches this process's memory no more.

        The link of its incarnation is down. An operation whose deadline passed has not failed: it
        goes on until `fenced`.
        """
        self._entries[operation.grant].uncertain |= operation.is_write
        self._broken |= operation.incarnation == self._link
        self._end(operation)

    def fenced(self) -> None:
        """This process destroyed its own agent: all its operations for this receiver stopped."""
        for entry in list(self._entries.values()):
            for operation in list(entry.under_way):
                self.failed(operation)

    def finish(self, grant: int) -> None:
        """The stage has begun everything that it will for this grant: forget it when it is done."""
        entry = self._entries.get(grant)
        if entry is not None:
            entry.finished = True
            self._forget(grant)

    # --- the receiver's word ------------------------------------------------------------------

    def revoke(self, grant: int, floor: int) -> None:
        """The receiver takes a grant back, and has ended all those below `floor`.

        A revocation may come before the grant itself, and more than once.
        """
        self._floor = max(self._floor, floor)
        self._revoked.add(grant)
        self._revoked = {g for g in self._revoked if g >= self._floor}
        self._unanswered.add(grant)
        self._unanswered &= self._revoked
        self._forget_old()

    def link_opened(self, incarnation: int) -> None:
        """The receiver opened this incarnation: it has fenced the older ones and their grants."""
        if incarnation > self._link:
            self._link = incarnation
            self._broken = False
            self._forget_old()

    def take_acknowledgements(self) -> list[int]:
        """Return the revoked grants that can be acknowledged now, each once a revocation.

        None before a link was opened: a ledger that never had one cannot speak for an earlier
        process, or for an earlier ledger of this one.
        """
        if not self._link:
            return []
        ready = sorted(grant for grant in self._unanswered if self._is_quiet(grant))
        self._unanswered.difference_update(ready)
        return ready

    # --- looking, for messages and tests ------------------------------------------------------

    def ended(self, grant: int) -> bool:
        """Tell whether the receiver took this grant back, or has ended it for good."""
        return grant < self._floor or grant in self._revoked

    def busy(self, grant: int) -> bool:
        """Tell whether operations of this grant may touch memory here: its pages stay."""
        entry = self._entries.get(grant)
        return entry is not None and bool(entry.under_way)

    def in_flight(self) -> int:
        """Return how many operations are under way."""
        return sum(len(entry.under_way) for entry in self._entries.values())

    def is_down(self, incarnation: int) -> bool:
        """Tell whether this incarnation is not, or no more, linked to this very process.

        If the link failed here, the receiver must hear LinkFailed.
        """
        return incarnation != self._link or self._broken

    # --- inside -------------------------------------------------------------------------------

    def _enter(self, grant: int, incarnation: int) -> _Entry:
        if self.ended(grant):
            raise GrantRevokedError(f"grant {grant} was taken back by its receiver")
        if self.is_down(incarnation):
            raise LinkDownError(f"the link to incarnation {incarnation} is down")
        return self._entries.setdefault(grant, _Entry(incarnation))

    def _end(self, operation: LinkOperation) -> None:
        self._entries[operation.grant].under_way.discard(operation)
        self._forget(operation.grant)

    def _is_quiet(self, grant: int) -> bool:
        entry = self._entries.get(grant)
        return entry is None or not (entry.under_way or entry.uncertain)

    def _forget_old(self) -> None:
        for grant in list(self._entries):
            self._forget(grant)

    def _forget(self, grant: int) -> None:
        """Drop what is known of a grant once nothing depends on it.

        That is, nothing is under way, and either all was done and nothing more comes, or the
        receiver has ended the grant itself.
        """
        entry = self._entries[grant]
        ended_there = grant < self._floor or entry.incarnation < self._link
        all_done = entry.finished and not entry.uncertain
        if not entry.under_way and (ended_there or all_done):
            del self._entries[grant]


def _begin(entry: _Entry, operation: LinkOperation) -> LinkOperation:
    entry.under_way.add(operation)
    return operation
