"""When a role may be scaled to zero. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_operator.labels import ROLES

if TYPE_CHECKING:
    from datetime import datetime

    from penstock_operator.api import InferenceService, Status
    from penstock_operator.labels import Role
    from penstock_operator.observed import Targets
    from penstock_operator.status import Observation

_CONDITIONS: dict[Role, str] = {"prefill": "PrefillReady", "decode": "DecodeReady"}


def shortest_idle(service: InferenceService, targets: Targets) -> float | None:
    """Return after how many idle seconds the next role may sleep, None if none may."""
    awake = [role for role in ROLES if not targets[role].asleep]
    return min((limit for r in awake if (limit := _limit(service, r)) is not None), default=None)


def may_sleep(
    service: InferenceService,
    seen: Observation,
    previous: Status | None,
    *,
    idle: float,
    now: datetime,
) -> list[Role]:
    """Return the roles that nobody has needed for their idle time.

    A role counts as idle from when it was ready at the earliest: one that has loaded weights for
    ten minutes for a request must not be taken away because there was none meanwhile.

    Args:
        service: its manifest.
        seen: what was observed.
        previous: the last status.
        idle: seconds without a request, of the router that has had one last.
        now: with a time zone.
    """
    roles: list[Role] = []
    for role in ROLES:
        limit = _limit(service, role)
        if limit is None or seen.targets[role].asleep or not seen.ready(role) or previous is None:
            continue
        since = next((c for c in previous.conditions if c.type == _CONDITIONS[role]), None)
        if since is None or since.status != "True":
            continue
        ready_for = (now - since.last_transition_time).total_seconds()
        if min(idle, ready_for) >= limit:
            roles.append(role)
    return roles


def _limit(service: InferenceService, role: Role) -> float | None:
    part = service.spec.role(role)
    if part is None or part.autoscaling is None or part.autoscaling.min_replicas > 0:
        return None
    return float(part.autoscaling.idle_seconds)
