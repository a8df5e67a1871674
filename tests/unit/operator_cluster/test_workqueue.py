"""One run a service at a time, wakes coalesce, failures back off, one never stops the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from penstock_operator.cluster.metrics import Metrics
from penstock_operator.cluster.workqueue import Wake, WorkQueue
from penstock_operator.errors import ApiUnavailable, LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_operator.cluster.kinds import Key

A, B = ("default", "a"), ("default", "b")


class Work:
    """Notes runs; a test holds them up with `gate`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.runs: list[tuple[Key, Wake]] = []
        self.errors: dict[Key, list[Exception]] = {}
        self.again: float | None = None
        self.active: Counter[Key] = Counter()
        self.began = asyncio.Event()

    async def __call__(self, key: Key, wake: Wake) -> float | None:
        self.runs.append((key, wake))
        self.active[key] += 1
        assert self.active[key] == 1, "two runs of one service at a time"
        self.began.set()
        try:
            await self.gate.wait()
            if self.errors.get(key):
                raise self.errors[key].pop(0)
            return self.again
        finally:
            self.active[key] -= 1


@contextlib.asynccontextmanager
async def running(work: Work, limit: float = 120.0) -> AsyncIterator[tuple[WorkQueue, Metrics]]:
    metrics = Metrics()
    queue = WorkQueue(work, metrics, workers=4, limit=limit)
    task = asyncio.create_task(queue.run())
    try:
        yield queue, metrics
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_wakes_during_a_run_make_one_more_run_with_all_their_reasons() -> None:
    work = Work()
    work.gate.clear()
    async with running(work) as (queue, _):
        queue.wake(A, Wake.CHANGE)
        await work.began.wait()
        for why in (Wake.POLL, Wake.CHANGE, Wake.FULL, Wake.CHANGE):
            queue.wake(A, why)
        work.gate.set()
        await queue.idle()
    assert work.runs == [(A, Wake.CHANGE), (A, Wake.POLL | Wake.CHANGE | Wake.FULL)]


async def test_a_run_that_hangs_does_not_hold_up_others() -> None:
    work = Work()
    work.gate.clear()
    async with running(work) as (queue, _):
        queue.wake(A, Wake.CHANGE)
        await work.began.wait()
        work.began.clear()
        queue.wake(B, Wake.CHANGE)
        await work.began.wait()
        assert [key for key, _ in work.runs] == [A, B]


async def test_a_failure_is_retried_with_its_reason_and_counted() -> None:
    work = Work()
    work.errors[A] = [ApiUnavailable("away"), RuntimeError("a defect")]
    async with running(work) as (queue, metrics):
        queue.wake(A, Wake.FULL)
        queue.wake(B, Wake.CHANGE)
        while len(work.runs) < 4:
            work.began.clear()
            await asyncio.wait_for(work.began.wait(), 10)
        await queue.idle()
        retries = [why for key, why in work.runs if key == A]
        assert retries == [Wake.FULL, Wake.FULL | Wake.CHANGE, Wake.FULL | Wake.CHANGE]
        text = metrics.render().decode()
    assert 'penstock_operator_reconcile_errors_total{kind="ApiUnavailable"} 1.0' in text
    assert 'penstock_operator_reconcile_errors_total{kind="RuntimeError"} 1.0' in text


async def test_a_run_that_asks_for_it_comes_again_as_a_poll() -> None:
    work = Work()
    work.again = 0.0
    async with running(work) as (queue, _):
        queue.wake(A, Wake.CHANGE)
        while len(work.runs) < 3:
            await asyncio.wait_for(work.began.wait(), 10)
            work.began.clear()
    assert [why for _, why in work.runs[:3]] == [Wake.CHANGE, Wake.POLL, Wake.POLL]


async def test_a_run_that_takes_too_long_is_ended_and_retried() -> None:
    work = Work()
    work.gate.clear()
    async with running(work, limit=0.05) as (queue, metrics):
        queue.wake(A, Wake.CHANGE)
        while len(work.runs) < 2:
            await asyncio.wait_for(work.began.wait(), 10)
            work.began.clear()
        assert b'kind="TimeoutError"' in metrics.render()


async def test_a_lost_lease_ends_the_queue() -> None:
    work = Work()
    work.errors[A] = [LeaseLost("gone")]
    queue = WorkQueue(work, Metrics())
    queue.wake(A, Wake.CHANGE)
    queue.wake(B, Wake.CHANGE)
    with pytest.raises(LeaseLost, match="gone"):
        await asyncio.wait_for(queue.run(), 10)


async def test_its_age_is_that_of_the_oldest_service_and_tells_when_it_is_stuck() -> None:
    now = 100.0
    queue = WorkQueue(Work(), Metrics(), limit=10.0, clock=lambda: now)
    assert queue.oldest() == 0.0
    queue.wake(A, Wake.CHANGE)
    now = 115.0
    queue.wake(B, Wake.CHANGE)
    assert queue.oldest() == 15.0
    assert not queue.stuck
    now = 121.0
    assert queue.stuck
