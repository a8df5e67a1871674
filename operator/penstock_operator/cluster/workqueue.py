"""A queue of services to reconcile: one run a service at a time, wakes coalesce, failures back off.

A wake during a run makes one more run afterwards. A run may say after how many seconds it wants the
next one; any wake before replaces that.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from typing import TYPE_CHECKING, Protocol

from penstock_operator.cluster import logs
from penstock_operator.errors import ApiError, LeaseLost, PenstockError

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_operator.cluster.kinds import Key
    from penstock_operator.cluster.metrics import Metrics

log = logging.getLogger(__name__)

_FIRST_BACKOFF = 0.5
_MOST_BACKOFF = 60.0
_GAP_SECONDS = 0.1
"""Between the beginnings of two runs of a service: what changes together is handled together."""


class Wake(enum.IntFlag):
    """Why a service is to be reconciled. Reasons add up until its turn."""

    POLL = 1
    """Its processes are to be asked again; its objects have not changed."""
    CHANGE = 2
    """Something of it changed."""
    FULL = 4
    """Whatever is remembered of it is not to be relied upon."""


class Reconcile(Protocol):
    """Brings one service to where it should be."""

    async def __call__(self, key: Key, wake: Wake) -> float | None:
        """Return after how many seconds to come again by itself, None for not at all."""
        ...


class WorkQueue:
    """Runs `reconcile` for every service that was woken.

    Args:
        reconcile: what is run. It may raise anything; only LeaseLost ends the queue.
        metrics: what is counted.
        workers: runs at once.
        limit: seconds that a run may take.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        reconcile: Reconcile,
        metrics: Metrics,
        *,
        workers: int = 8,
        limit: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reconcile = reconcile
        self._metrics = metrics
        self._workers = workers
        self._limit = limit
        self._clock = clock
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._dirty: dict[Key, tuple[float, Wake]] = {}
        """Woken and not begun: since when, and why."""
        self._active: dict[Key, float] = {}
        """Being reconciled: since when."""
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.follow(metrics.queue_depth, lambda: len(self._dirty))
        metrics.follow(metrics.queue_age, self.oldest)

    def wake(self, key: Key, why: Wake) -> None:
        """Have a service reconciled soon."""
        self._idle.clear()
        since, before = self._dirty.get(key, (self._clock(), Wake(0)))
        self._dirty[key] = (since, before | why)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if not before and key not in self._active:
            self._ready.put_nowait(key)

    def oldest(self) -> float:
        """Return for how many seconds the oldest service has waited or been worked on."""
        starts = [*self._active.values(), *(since for since, _ in self._dirty.values())]
        return max(0.0, self._clock() - min(starts)) if starts else 0.0

    @property
    def stuck(self) -> bool:
        """Whether a service has waited for, or been in, its run for longer than can be."""
        return self.oldest() > 2 * self._limit

    async def run(self) -> None:
        """Work for ever. Raises LeaseLost."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._workers):
                    group.create_task(self._work(), name=f"reconcile-{number}")
        except* LeaseLost as lost:
            raise lost.exceptions[0] from None

    async def idle(self) -> None:
        """Wait until nothing is woken and nothing runs; timers do not count."""
        await self._idle.wait()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            _, why = self._dirty.pop(key)
            began = self._active[key] = self._clock()
            again: tuple[float, Wake] | None = None
            logs.SERVICE.set("/".join(key))
            try:
                again = await self._once(key, why)
            finally:
                self._metrics.reconcile_seconds.observe(self._clock() - began)
                self._finish(key, again, began)

    async def _once(self, key: Key, why: Wake) -> tuple[float, Wake] | None:
        """Run once; return when and why to run again."""
        try:
            async with asyncio.timeout(self._limit):
                delay = await self._reconcile(key, why)
        except LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001 - one service never stops the others
            return self._failed(key, why, error)
        self._failures.pop(key, None)
        self._metrics.last_success.set(time.time())
        return None if delay is None else (delay, Wake.POLL)

    def _failed(self, key: Key, why: Wake, error: Exception) -> tuple[float, Wake]:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = min(_FIRST_BACKOFF * 2 ** min(count - 1, 16), _MOST_BACKOFF)
        wait *= 1 + random.random() / 10  # noqa: S311 - nothing secret
        self._metrics.reconcile_errors.labels(type(error).__name__).inc()
        known = isinstance(error, PenstockError)
        log.log(
            logging.WARNING if isinstance(error, ApiError) else logging.ERROR,
            "attempt %d failed, the next one is in %.1f s: %s",
            count,
            wait,
            error if known else f"{type(error).__name__}: {error}",
            exc_info=None if known or isinstance(error, TimeoutError) else error,
        )
        return wait, why | Wake.CHANGE

    def _finish(self, key: Key, again: tuple[float, Wake] | None, began: float) -> None:
        del self._active[key]
        loop = asyncio.get_running_loop()
        if key in self._dirty:
            pause = max(0.0, began + _GAP_SECONDS - self._clock())
            loop.call_later(pause, self._ready.put_nowait, key)
        elif again is not None:
            delay, why = again
            self._timers[key] = loop.call_later(delay, self._fire, key, why)
        if not self._dirty and not self._active:
            self._idle.set()

    def _fire(self, key: Key, why: Wake) -> None:
        self._timers.pop(key, None)
        self.wake(key, why)
