"""Leader election by a Lease: one operator writes, others stand by.

The rules are those of client-go. A holder renews every `retry` seconds. It counts as leader until
`deadline` seconds after it began its last successful renewal, and others wait for `duration`
seconds without a change before they take over. Since the deadline is shorter than the duration, and
no write may outlast the duration, two operators never write at the same time. Only the monotonic
clock of each process is read; what a lease says about time is compared, never believed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from penstock_operator.cluster.kinds import LEASE, Object
from penstock_operator.cluster.transport import Request, outcome
from penstock_operator.errors import ApiConflict, ApiError, ApiMissing, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_operator.cluster.transport import Transport

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 3.0
"""Time for one request: several fit before the deadline."""


class Elector:
    """Holds the lease, or waits for it.

    Args:
        transport: where the API is.
        namespace, name: of the Lease.
        identity: this process, unlike every other and every earlier one.
        duration: seconds after which others take over.
        deadline: seconds after which this process stops to write.
        retry: seconds between attempts.
        clock: monotonic seconds.
        sleep: waits for seconds of that clock.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        namespace: str,
        name: str,
        identity: str,
        duration: float = 15.0,
        deadline: float = 10.0,
        retry: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.acquired: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport = transport
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._duration = duration
        self._deadline = deadline
        self._retry = retry
        self._clock = clock
        self._sleep = sleep
        self._until = 0.0
        self._answered = clock()
        self._seen: tuple[object, float] = (None, 0.0)
        """What the lease said last, and when that was first seen."""

    @property
    def held(self) -> bool:
        """Whether this process leads now."""
        return self._clock() < self._until

    @property
    def answering(self) -> bool:
        """Whether the API has answered lately: without, a standby could not take over."""
        return self._clock() - self._answered < 2 * self._duration

    def write_seconds(self) -> float:
        """Return how long a write that begins now may take. Raises LeaseLost if none may begin."""
        left = self._until - self._clock()
        if left <= 0:
            raise LeaseLost(
                f"the lease {self._namespace}/{self._name} was not renewed within "
                f"{self._deadline:g} s, so nothing may be written",
                remedy="another operator may lead by now; this one ends and stands by again",
            )
        return left + self._duration - self._deadline

    async def run(self) -> None:
        """Acquire the lease and renew it for ever. Raises LeaseLost once it is lost."""
        led = False
        while True:
            try:
                await self.attempt()
            except ApiConflict:
                log.info("another operator was faster at the lease %s", self._name)
            except ApiError as error:
                log.warning("the lease %s cannot be renewed: %s", self._name, error)
            if self.held:
                led = True
                if not self.acquired.done():
                    self.acquired.set_result(None)
            elif led:
                self.write_seconds()
            await self._sleep(self._pause())

    async def release(self) -> None:
        """Let the next operator take over at once. Does nothing if the lease is not held."""
        if not self.held:
            return
        self._until = 0.0
        try:
            found = await self._read()
            if found is not None and _holder(found) == self._identity:
                await self._write(found, holder="")
        except ApiError as error:
            log.warning("the lease %s cannot be released: %s", self._name, error)

    def _pause(self) -> float:
        """Not in step with others; not past the moment at which the lease would be lost."""
        pause = self._retry * (1 + random.random() / 10)  # noqa: S311 - nothing secret
        left = self._until - self._clock()
        return min(pause, left) if left > 0 else pause

    async def attempt(self) -> None:
        """Try once to acquire the lease, or to renew it. Raises ApiError."""
        began = self._clock()
        found = await self._read()
        self._answered = self._clock()
        if found is not None and not self._may_take(found, began):
            self._until = 0.0
            return
        await self._write(found, holder=self._identity)
        self._until = began + self._deadline

    def _may_take(self, found: Object, now: float) -> bool:
        """Whether nobody else holds the lease, or its holder has been silent for too long."""
        holder = _holder(found)
        if not holder or holder == self._identity:
            return True
        said = (holder, found["spec"].get("renewTime"))
        if said != self._seen[0]:
            self._seen = (said, now)
        duration = found["spec"].get("leaseDurationSeconds")
        limit = float(duration) if isinstance(duration, int) else self._duration
        return now - self._seen[1] >= limit

    async def _read(self) -> Object | None:
        path = LEASE.path(self._namespace, self._name)
        try:
            return outcome(await self._transport.send(Request("GET", path), _REQUEST_SECONDS))
        except ApiMissing:
            return None

    async def _write(self, found: Object | None, *, holder: str) -> None:
        """Create or replace the lease; the resourceVersion makes all but one writer fail."""
        before = (found or {}).get("spec") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = before.get("holderIdentity") == holder
        changes = int(before.get("leaseTransitions") or 0)
        body: Object = {
            **(found or {}),
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": int(self._duration),
                "acquireTime": before.get("acquireTime") if same else now,
                "renewTime": now,
                "leaseTransitions": changes if same or not found or not holder else changes + 1,
            },
        }
        if found is None:
            body["metadata"] = {"name": self._name, "namespace": self._namespace}
            request = Request("POST", LEASE.path(self._namespace), body=body)
        else:
            request = Request("PUT", LEASE.path(self._namespace, self._name), body=body)
        outcome(await self._transport.send(request, _REQUEST_SECONDS))


def _holder(lease: Object) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")
