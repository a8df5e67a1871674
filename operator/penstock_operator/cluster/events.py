"""Events of Kubernetes, one for each condition that flips. They inform; nothing depends on them."""

from __future__ import annotations

import logging
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from penstock_operator.cluster.kinds import EVENT, SERVICE
from penstock_operator.cluster.kube import MANAGER
from penstock_operator.errors import ApiError
from penstock_operator.status import transitions

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_operator.api import Condition, Status
    from penstock_operator.cluster.kinds import Object
    from penstock_operator.cluster.kube import Kube
    from penstock_operator.cluster.metrics import Metrics

log = logging.getLogger(__name__)

_QUIET_SECONDS = 60.0
"""The same flip is told once in this time: a condition that flaps would bury everything else."""
_LONGEST_MESSAGE = 1000
"""Characters; the API refuses more than 1024."""
_REMEMBERED = 4096


class Events:
    """Posts events, each once.

    Args:
        kube: the API.
        identity: of this operator.
        metrics: counts what could not be posted.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        identity: str,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._identity = identity
        self._metrics = metrics
        self._clock = clock
        self._told: dict[tuple[str, ...], float] = {}

    async def tell(self, service: Object, previous: Status | None, current: Status) -> None:
        """Post what flipped. An event that cannot be posted is counted and logged."""
        uid = str(service["metadata"]["uid"])
        for condition in worth_telling(previous, current):
            flip = (uid, condition.type, condition.status, condition.reason)
            now = self._clock()
            if now - self._told.get(flip, -_QUIET_SECONDS) < _QUIET_SECONDS:
                continue
            self._remember(flip, now)
            try:
                await self._kube.create(self._event(service, condition))
            except ApiError as error:
                self._metrics.events_failed.inc()
                log.warning("an event of %s is lost: %s", service["metadata"]["name"], error)

    def _remember(self, flip: tuple[str, ...], now: float) -> None:
        self._told.pop(flip, None)
        self._told[flip] = now
        if len(self._told) > _REMEMBERED:
            del self._told[next(iter(self._told))]

    def _event(self, service: Object, condition: Condition) -> Object:
        meta = service["metadata"]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {
                "name": f"{meta['name']}.{secrets.token_hex(8)}",
                "namespace": meta["namespace"],
            },
            "involvedObject": {
                "apiVersion": SERVICE.api_version,
                "kind": SERVICE.name,
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
                "resourceVersion": meta.get("resourceVersion"),
            },
            "type": "Warning" if _is_bad(condition) else "Normal",
            "reason": condition.reason,
            "message": f"{condition.type}: {condition.message}"[:_LONGEST_MESSAGE],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": MANAGER},
            "reportingComponent": f"penstock.dev/{MANAGER}",
            "reportingInstance": self._identity[:128],
        }


def worth_telling(previous: Status | None, current: Status) -> list[Condition]:
    """Return the conditions that flipped; of a new service only what is wrong already."""
    flipped = transitions(previous, current)
    if previous is not None and previous.conditions:
        return flipped
    return [c for c in flipped if c.type in ("ConfigValid", "Degraded") and _is_bad(c)]


def _is_bad(condition: Condition) -> bool:
    if condition.type == "Progressing":
        return False
    return condition.status == ("True" if condition.type == "Degraded" else "False")
