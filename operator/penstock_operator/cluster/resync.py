"""Compares what is remembered with what is there, at long intervals.

A watch that lost its place lists again and does not tell what was deleted meanwhile; one whose
connection died in silence tells nothing at all. So every object is listed (metadata only), what is
remembered of deleted ones is forgotten, and what a watch has not told of is noted. If it has still
not told at the next look, some time later, the watch is dead and /healthz says so. Then every
service is reconciled as if nothing were remembered.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from penstock_operator import labels
from penstock_operator.cluster.children import version_of
from penstock_operator.cluster.kinds import SERVICE, WATCHED
from penstock_operator.cluster.watches import identity_of
from penstock_operator.cluster.workqueue import Wake
from penstock_operator.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from penstock_operator.cluster.children import Children
    from penstock_operator.cluster.kinds import Key, Kind, Object
    from penstock_operator.cluster.kube import Kube
    from penstock_operator.cluster.metrics import Metrics
    from penstock_operator.cluster.watches import Watches
    from penstock_operator.cluster.workqueue import WorkQueue

log = logging.getLogger(__name__)

_GRACE_SECONDS = 120.0
"""A watch may be so late: kopf gives up a silent connection after 70 s and connects again."""
_FIRST_SECONDS = 60.0
"""Soon after the start: what was edited by hand while no operator ran carries the old mark."""


class Resync:
    """Looks for what the watches missed."""

    def __init__(
        self,
        kube: Kube,
        children: Children,
        watches: Watches,
        queue: WorkQueue,
        metrics: Metrics,
        *,
        seconds: float,
        namespaces: Iterable[str] = (),
    ) -> None:
        self.dead: frozenset[str] = frozenset()
        """Resources whose watch has told nothing of changes that happened long ago."""
        self._kube = kube
        self._children = children
        self._watches = watches
        self._queue = queue
        self._metrics = metrics
        self._seconds = seconds
        self._namespaces = tuple(namespaces) or ("",)

    async def run(self) -> None:
        """Compare for ever."""
        await asyncio.sleep(min(_FIRST_SECONDS, self._seconds))
        while True:
            try:
                await self.once(grace=min(_GRACE_SECONDS, self._seconds))
            except ApiError as error:
                log.warning("the cluster cannot be compared with: %s", error)
            await asyncio.sleep(self._seconds * random.uniform(0.9, 1.1))  # noqa: S311

    async def once(self, *, grace: float) -> None:
        """Compare, and reconcile every service whatever is remembered of it.

        Raises ApiError.
        """
        first = {kind: await self._compare(kind) for kind in (*WATCHED, SERVICE)}
        for key in list(self._watches.services):
            self._queue.wake(key, Wake.FULL)
        suspects = [kind for kind, late in first.items() if late]
        if suspects:
            await asyncio.sleep(grace)
        dead = []
        for kind in suspects:
            second = await self._compare(kind)
            if first[kind].items() & second.items():
                dead.append(kind.plural)
                log.error("the watch of %s is dead: it does not tell of changes", kind.plural)
        self.dead = frozenset(dead)

    async def _compare(self, kind: Kind) -> dict[str, str]:
        """Forget what is gone; return what the watch has not told of, and what it told last."""
        if kind is SERVICE:
            return await self._compare_services()
        known = {
            child.uid: (key, child.name)
            for key in self._children.services()
            for (name, _), child in self._children.of(key).items()
            if name == kind.name
        }
        late: dict[str, str] = {}
        there = set()
        for obj in await self._metadata(kind, labels.SERVICE):
            uid = str(obj["metadata"]["uid"])
            there.add(uid)
            version = self._children.version(uid)
            if not self._children.is_gone(uid) and (version is None or version < version_of(obj)):
                late[uid] = f"version {version}"
        for uid in known.keys() - there:
            key, name = known[uid]
            if self._children.remove(kind, key, name, uid):
                self._metrics.watch_repairs.labels(kind.plural).inc()
                self._queue.wake(key, Wake.CHANGE)
        return late

    async def _compare_services(self) -> dict[str, str]:
        """The same for services. Those that the watch has not told of are reconciled at once."""
        services = self._watches.services
        began = set(services)
        there: set[Key] = set()
        late: dict[str, str] = {}
        for obj in await self._metadata(SERVICE, ""):
            key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
            there.add(key)
            if services.get(key) != identity_of(obj):
                late["/".join(key)] = str(services.get(key))
                self._queue.wake(key, Wake.FULL)
        for key in began - there:
            if services.pop(key, None) is not None:
                self._metrics.watch_repairs.labels(SERVICE.plural).inc()
                self._queue.wake(key, Wake.CHANGE)
        return late

    async def _metadata(self, kind: Kind, selector: str) -> list[Object]:
        found: list[Object] = []
        for namespace in self._namespaces:
            async for page in self._kube.pages(
                kind, namespace=namespace, labels=selector, metadata_only=True
            ):
                found += page.get("items") or []
        return found
