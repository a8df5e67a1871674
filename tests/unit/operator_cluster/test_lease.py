"""Two operators never write at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator.cluster import kinds
from penstock_operator.cluster.kube import Kube
from penstock_operator.cluster.lease import Elector
from penstock_operator.errors import ApiError, LeaseLost
from tests.unit.operator_cluster.fake_api import FakeApi

if TYPE_CHECKING:
    from penstock_operator.cluster.transport import Request

DURATION, DEADLINE = 15.0, 10.0


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    async def reaches(self, when: float) -> None:
        """Wait until somebody's sleep has brought it there."""
        for _ in range(1000):
            if self.now >= when:
                return
            await asyncio.sleep(0)
        raise AssertionError("time stands still")


def health(each: Elector) -> tuple[bool, bool]:
    return each.held, each.answering


def elector(api: FakeApi, clock: Clock, name: str) -> Elector:
    return Elector(
        api,
        namespace="default",
        name="penstock-operator",
        identity=name,
        duration=DURATION,
        deadline=DEADLINE,
        # Each counts its own seconds: clocks of two machines have nothing to do with each other.
        clock=lambda: clock.now + (5e5 if name == "b" else 0.0),
        sleep=clock.sleep,
    )


def holder(api: FakeApi) -> str:
    return str(api.get(kinds.LEASE, "penstock-operator")["spec"]["holderIdentity"])


async def test_the_first_leads_and_the_second_takes_over_when_it_falls_silent() -> None:
    api, clock = FakeApi(), Clock()
    first, second = elector(api, clock, "a"), elector(api, clock, "b")
    await first.attempt()
    await second.attempt()
    assert [each.held for each in (first, second)] == [True, False]
    clock.now += DURATION - 0.1
    await second.attempt()
    assert [each.held for each in (first, second)] == [False, False]
    clock.now += 0.1
    await second.attempt()
    assert [each.held for each in (first, second)] == [False, True]
    assert holder(api) == "b"
    assert api.get(kinds.LEASE, "penstock-operator")["spec"]["leaseTransitions"] == 1


async def test_a_renewal_keeps_others_away() -> None:
    api, clock = FakeApi(), Clock()
    first, second = elector(api, clock, "a"), elector(api, clock, "b")
    for _ in range(20):
        await first.attempt()
        await second.attempt()
        clock.now += 2
    assert (first.held, second.held) == (True, False)


async def test_a_released_lease_is_taken_at_once() -> None:
    api, clock = FakeApi(), Clock()
    first, second = elector(api, clock, "a"), elector(api, clock, "b")
    await first.attempt()
    await first.release()
    assert not first.held
    await second.attempt()
    assert second.held


async def test_a_standby_releases_nothing() -> None:
    api, clock = FakeApi(), Clock()
    first, second = elector(api, clock, "a"), elector(api, clock, "b")
    await first.attempt()
    await second.attempt()
    await second.release()
    assert holder(api) == "a"


async def test_a_leader_that_cannot_renew_ends() -> None:
    api, clock = FakeApi(), Clock()
    leader = elector(api, clock, "a")
    await leader.attempt()
    api.fail = lambda request: "before"
    began = clock.now
    with pytest.raises(LeaseLost, match="was not renewed within 10 s"):
        await leader.run()
    assert clock.now - began == pytest.approx(DEADLINE, abs=0.1)
    assert leader.answering, "the API has answered within the last half minute"


async def test_a_standby_waits_for_an_api_that_is_away_and_says_so() -> None:
    api, clock = FakeApi(), Clock()
    standby = elector(api, clock, "a")
    api.fail = lambda request: "before"
    task = asyncio.create_task(standby.run())
    await clock.reaches(clock.now + 2 * DURATION)
    assert health(standby) == (False, False)
    assert not task.done()
    api.fail = lambda request: None
    await standby.acquired
    assert health(standby) == (True, True)
    task.cancel()


async def test_a_leader_that_was_stopped_does_not_write_afterwards() -> None:
    api, clock = FakeApi(), Clock()
    leader = elector(api, clock, "a")
    await leader.attempt()
    kube = Kube(api, leader)
    clock.now += DEADLINE
    calls = len(api.calls)
    with pytest.raises(LeaseLost):
        await kube.delete(kinds.POD, "default", "x", "uid")
    assert len(api.calls) == calls


async def test_a_write_ends_before_another_operator_can_begin() -> None:
    api, clock = FakeApi(), Clock()
    leader = elector(api, clock, "a")
    began = clock.now
    await leader.attempt()
    for passed in (0.0, 5.0, 9.9):
        clock.now = began + passed
        assert clock.now + leader.write_seconds() <= began + DURATION


steps = st.tuples(
    st.sampled_from(["a", "b"]),
    st.floats(0.0, 20.0),
    st.sampled_from([None, None, None, "before", "after"]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=25))
def test_two_operators_never_write_at_the_same_time(
    series: list[tuple[str, float, str | None, bool]],
) -> None:
    async def play() -> None:
        api, clock = FakeApi(), Clock()
        electors = {name: elector(api, clock, name) for name in "ab"}
        allowed = {"a": 0.0, "b": 0.0}
        """Until when a write that was allowed may last."""
        for name, pause, failure, only_reads in series:
            clock.now += pause

            def fail(
                request: Request, failure: str | None = failure, spare: bool = only_reads
            ) -> str | None:
                return None if spare and request.method == "GET" else failure

            api.fail = fail
            with contextlib.suppress(ApiError):
                await electors[name].attempt()
            other = "b" if name == "a" else "a"
            if electors[name].held:
                assert allowed[other] <= clock.now, "the other may still be writing"
                allowed[name] = clock.now + electors[name].write_seconds()
            assert not all(each.held for each in electors.values())

    asyncio.run(play())
