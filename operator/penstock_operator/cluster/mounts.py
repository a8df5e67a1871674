"""What keeps a pod that has a node without containers: only its events tell."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock_operator.cluster.kinds import EVENT
from penstock_operator.cluster.pods import waits_for_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_operator.cluster.children import Child
    from penstock_operator.cluster.kinds import Object
    from penstock_operator.cluster.kube import Kube

_REASONS = frozenset({"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"})
_MOST_PODS = 4
"""Pods of a service whose events are read: the others wait for the same."""
_MOST_EVENTS = 50


async def mount_failures(kube: Kube, namespace: str, pods: Sequence[Child]) -> dict[str, str]:
    """Return what could not be set up for pods that wait, by the pod's uid. Raises ApiError."""
    stuck = [pod for pod in pods if waits_for_volumes(pod)][:_MOST_PODS]
    told = await asyncio.gather(*(_failure(kube, namespace, pod) for pod in stuck))
    return {pod.uid: text for pod, text in zip(stuck, told, strict=True) if text}


async def _failure(kube: Kube, namespace: str, pod: Child) -> str:
    fields = f"involvedObject.uid={pod.uid}"
    found = await kube.select(EVENT, namespace, fields=fields, limit=_MOST_EVENTS)
    newest = max(found, key=_time_of, default={})
    if newest.get("reason") not in _REASONS:
        return ""  # it has come further since
    return str(newest.get("message") or newest["reason"])[:1024]


def _time_of(event: Object) -> str:
    """Return when an event was seen last; times of one format compare as text."""
    series = event.get("series")
    times = (
        (series if isinstance(series, dict) else {}).get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
    )
    return next((str(when) for when in times if when), "")
