"""Scale from zero: a request that finds nobody wakes the role that sleeps, and is held.

    takes work ──workers gone──► looked up ──scale 0──► asleep ──request──► PATCH to 1 ──► waking
        ▲                            └──scale > 0, nobody listed──────────────────────────► │
        └───────────────────────────── a worker is ready ◄──────────────────────────────────┘

The scaler's own number decides, never a guess from who is there: a role whose workers crashed is
not asleep. So nothing is asked of the API while a role takes work, and one GET, and at most one
PATCH, is made for all requests that wait together. Several routers may wake a role at once: a write
that lost the race is refused, and the next look finds it done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, TypeAlias

from penstock_router.errors import KubernetesError
from penstock_wire.rhythm import until_next

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock_router.metrics import Metrics
    from penstock_router.scaling import Scales
    from penstock_router.workers import Fleet

log = logging.getLogger(__name__)

SleepingRole: TypeAlias = Literal["decode", "prefill"]

_TICK_SECONDS = 1.0
"""Between two looks at the fleet, which cost nothing, and between two asks of the API while a
request waits."""
_WAKING_LOOK_SECONDS = 5.0
"""Between two asks while a role wakes: somebody may put it back to sleep."""
_ASLEEP_LOOK_SECONDS = 60.0
"""Between two asks while it sleeps and nobody waits: 500 sleeping services with two routers cost
the API server 33 small reads a second."""


@dataclass(slots=True, eq=False)
class _Sleeper:
    """What is known of one role that may be scaled to zero."""

    role: SleepingRole
    scaler: str
    replicas: int | None = None
    """Of the last look; None: not looked since the role last took work."""
    waking: bool = False
    wanted: bool = False
    """A request has come since the last look that found nobody."""
    look_at: float = 0.0
    """When to look again though nobody waits, on the monotonic clock."""
    problem: str = ""
    nudged: asyncio.Event = field(default_factory=asyncio.Event)

    def forget(self) -> None:
        """The role takes work: what was known of its sleep is over."""
        self.replicas = None
        self.waking = self.wanted = False
        self.look_at = 0.0
        self.problem = ""


class Waker:
    """Wakes roles that are scaled to zero.

    Args:
        fleet: tells who is there.
        scales: where scalers are read and written; None if no role sleeps.
        scalers: the scaler of each role that may sleep.
        metrics: counts what was woken.
        seconds: how long a request may be held for a role that wakes.
    """

    def __init__(
        self,
        fleet: Fleet,
        scales: Scales | None,
        scalers: Mapping[SleepingRole, str],
        metrics: Metrics,
        *,
        seconds: float,
    ) -> None:
        self.seconds = seconds
        self._fleet = fleet
        self._scales = scales
        self._metrics = metrics
        self._sleepers = {role: _Sleeper(role, name) for role, name in scalers.items()}

    async def run(self) -> None:
        """Follow the roles that may sleep, for ever."""
        if self._scales is None:
            return
        async with asyncio.TaskGroup() as group:
            for sleeper in self._sleepers.values():
                group.create_task(self._follow(sleeper, self._scales), name=f"wake {sleeper.role}")

    @property
    def sleeps(self) -> bool:
        """Whether any role may be scaled to zero."""
        return bool(self._sleepers)

    # --- questions ----------------------------------------------------------------------------

    def request(self) -> None:
        """A request is here: wake the roles that nobody of takes work. Cheap; call it often."""
        for sleeper in self._sleepers.values():
            if self._takes_work(sleeper.role):
                sleeper.forget()  # at once: what waited for it is served, and wakes nobody later
            else:
                sleeper.wanted = True
                sleeper.nudged.set()

    def holds(self) -> bool:
        """Return whether a request that no decode worker can take is to be held.

        That is while the role sleeps or wakes, not while its workers are there and fail.
        """
        sleeper = self._sleepers.get("decode")
        if sleeper is None or self._takes_work("decode"):
            return False
        return sleeper.replicas == 0 or sleeper.waking or not self._fleet.lists("decode")

    def asleep(self, role: SleepingRole) -> bool:
        """Return whether the role is scaled to zero, and a request would wake it."""
        sleeper = self._sleepers.get(role)
        return (
            sleeper is not None
            and sleeper.replicas == 0
            and not sleeper.problem
            and not self._takes_work(role)
        )

    def waking(self, role: SleepingRole) -> bool:
        """Return whether the role is on its way up from zero."""
        sleeper = self._sleepers.get(role)
        return sleeper is not None and sleeper.waking and not self._takes_work(role)

    def problem(self, role: SleepingRole) -> str:
        """Return why the role cannot be woken, empty if it can."""
        sleeper = self._sleepers.get(role)
        return "" if sleeper is None or self._takes_work(role) else sleeper.problem

    def _takes_work(self, role: SleepingRole) -> bool:
        fleet = self._fleet
        return bool(fleet.decode_workers() if role == "decode" else fleet.prefill_groups())

    # --- work ---------------------------------------------------------------------------------

    async def _follow(self, sleeper: _Sleeper, scales: Scales) -> None:
        while True:
            sleeper.nudged.clear()
            if self._takes_work(sleeper.role):
                sleeper.forget()
            elif sleeper.wanted or time.monotonic() >= sleeper.look_at:
                await self._look(sleeper, scales)
                await asyncio.sleep(_TICK_SECONDS)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(until_next(_TICK_SECONDS)):
                    await sleeper.nudged.wait()

    async def _look(self, sleeper: _Sleeper, scales: Scales) -> None:
        """Read the scale, and raise it from zero if a request waits."""
        wanted, sleeper.wanted = sleeper.wanted, False
        try:
            scale = await scales.read(sleeper.scaler)
            woken = wanted and scale.replicas == 0
            if woken:
                await scales.write(sleeper.scaler, 1, version=scale.version)
                log.info("a request woke %s, which was scaled to zero", sleeper.role)
                self._metrics.wakes.labels(sleeper.role).inc()
        except KubernetesError as error:
            sleeper.wanted = wanted or sleeper.wanted
            if error.status != HTTPStatus.CONFLICT:
                self._cannot(sleeper, str(error))
            return
        sleeper.problem = ""
        self._note(sleeper, 1 if woken else scale.replicas)

    def _note(self, sleeper: _Sleeper, replicas: int) -> None:
        slept = sleeper.replicas == 0 or not self._fleet.lists(sleeper.role)
        sleeper.waking = replicas > 0 and (sleeper.waking or slept)
        sleeper.replicas = replicas
        pause = _WAKING_LOOK_SECONDS if replicas else _ASLEEP_LOOK_SECONDS
        sleeper.look_at = time.monotonic() + pause

    def _cannot(self, sleeper: _Sleeper, why: str) -> None:
        if sleeper.problem != why:
            log.warning("whether %s sleeps is not known: %s", sleeper.role, why)
        sleeper.problem = why
        sleeper.look_at = time.monotonic() + _WAKING_LOOK_SECONDS
