"""Every reachable state of the ownership rules is safe, and weaker rules are found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.ownership import Delivery, GrantLedger, Revocation
from penstock_runtime.transfer.writer import WriterLedger
from tests.unit.runtime.transfer.ownership_model import Bounds, Rules, ViolationError, explore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.transfer.writer import LinkOperation

WORLDS = {
    "one stage, every fault": Bounds(stages=1, tokens=1, duplicates=0),
    "one stage, messages twice": Bounds(stages=1, tokens=1, grants=1),
    "one stage, two pages": Bounds(stages=1, tokens=2, grants=1, duplicates=0),
    "a prefix to load": Bounds(stages=1, tokens=2, cached=1, grants=1),
    "two stages, no fault": Bounds(stages=2, tokens=1, crashes=0, breaks=0, fences=0, duplicates=0),
    "two stages, a crash": Bounds(stages=2, tokens=1, grants=1, breaks=0, duplicates=0),
    "two stages, a broken link": Bounds(stages=2, tokens=1, grants=1, crashes=0, duplicates=0),
}
SMALLEST = {
    "one stage, every fault": 2000,
    "two stages, a crash": 3000,
}
"""A world that shrinks below this has lost some of its faults."""


@pytest.mark.parametrize("name", WORLDS)
def test_no_reachable_state_breaks_a_rule(name: str) -> None:
    assert explore(WORLDS[name]) > SMALLEST.get(name, 50)


class AcknowledgesAfterAFailedWrite(WriterLedger):
    def failed(self, operation: LinkOperation) -> None:
        self.done(operation)


class AcknowledgesWithoutALink(WriterLedger):
    def take_acknowledgements(self) -> list[int]:
        link, self._link = self._link, -1
        ready = super().take_acknowledgements()
        self._link = link
        return ready


class WritesAfterARevocation(WriterLedger):
    def ended(self, grant: int) -> bool:
        return False


class ReadsWhatOneStageDelivered(GrantLedger):
    def delivered(
        self, incarnation: int, grant: int, stage: int, start: int, end: int
    ) -> Delivery | None:
        entry = self._open.get(grant)
        if entry is not None:
            entry.announced = [entry.announced[stage]] * len(entry.announced)
        return super().delivered(incarnation, grant, stage, start, end)


class ReleasesThePrefixAtOnce(GrantLedger):
    def revoke(self, grant: int) -> Revocation:
        revocation = super().revoke(grant)
        waiting = self._quarantined[grant]
        self._pool.release(waiting.lent)
        waiting.lent = ()
        return revocation


class FreesAtRevocation(GrantLedger):
    def revoke(self, grant: int) -> Revocation:
        revocation = super().revoke(grant)
        self._settle(grant)
        return revocation


class TrustsEveryLink(GrantLedger):
    def open(
        self,
        *,
        incarnation: int,
        writers: Sequence[str],
        pages: Sequence[int],
        cached: int,
        end: int,
    ) -> int:
        self._linked.clear()
        return super().open(
            incarnation=incarnation, writers=writers, pages=pages, cached=cached, end=end
        )


class NeverSettles(GrantLedger):
    def acknowledged(self, grant: int, stage: int, writer: str) -> bool:
        return False


@dataclass(frozen=True)
class Mutation:
    rules: Rules
    bounds: Bounds
    found: str


QUIET = Bounds(stages=1, tokens=1, crashes=0, breaks=0, fences=0, duplicates=0, grants=1)
ONE_CRASH = Bounds(stages=1, tokens=1, breaks=0, duplicates=0)
MUTATIONS = {
    "free on a timeout": Mutation(Rules(free_on_timeout=True), QUIET, "lands in a free page"),
    "free when the writer is dead": Mutation(
        Rules(free_when_dead=True), ONE_CRASH, "lands in a free page"
    ),
    "free at the revocation": Mutation(
        Rules(ledger=FreesAtRevocation), QUIET, "lands in a free page"
    ),
    "take a successor's acknowledgement": Mutation(
        Rules(any_process_acknowledges=True, writer=AcknowledgesWithoutALink),
        ONE_CRASH,
        "lands in a free page",
    ),
    "link a restarted stage without a fence": Mutation(
        Rules(ledger=TrustsEveryLink, link_restarted=True), ONE_CRASH, "lands in a free page"
    ),
    "acknowledge after a failed write": Mutation(
        Rules(writer=AcknowledgesAfterAFailedWrite),
        Bounds(stages=1, tokens=1, crashes=0, duplicates=0),
        "lands in a free page",
    ),
    "write after a revocation": Mutation(
        Rules(writer=WritesAfterARevocation), QUIET, "lands in a free page"
    ),
    "read what one stage delivered": Mutation(
        Rules(ledger=ReadsWhatOneStageDelivered),
        Bounds(stages=2, tokens=1, crashes=0, breaks=0, fences=0, duplicates=0, grants=1),
        "is read before stage",
    ),
    "release the prefix at the revocation": Mutation(
        Rules(ledger=ReleasesThePrefixAtOnce),
        Bounds(stages=1, tokens=2, cached=1, crashes=0, breaks=0, fences=0, duplicates=0),
        "which it keeps no more",
    ),
    "never settle": Mutation(Rules(ledger=NeverSettles), QUIET, "without a fault this is left"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_weaker_rule_is_found_out(name: str) -> None:
    mutation = MUTATIONS[name]
    with pytest.raises(ViolationError, match=mutation.found):
        explore(mutation.bounds, mutation.rules)
