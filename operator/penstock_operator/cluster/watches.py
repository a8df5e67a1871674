"""What changes in the cluster, as wakes. kopf watches and does nothing else.

Handlers of events leave nothing on objects: no finalizer, no annotation. kopf's own LISTs are the
second ones: `prime` has filled `Children` before, so that no service is seen by halves.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import kopf

from penstock_operator import labels
from penstock_operator.cluster.connect import connection_info
from penstock_operator.cluster.kinds import SERVICE, WATCHED
from penstock_operator.cluster.kube import PAGE
from penstock_operator.cluster.no_storage import NoDiffBase, NoProgress
from penstock_operator.cluster.workqueue import Wake
from penstock_operator.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from penstock_operator.cluster.children import Children
    from penstock_operator.cluster.kinds import Key, Kind, Object
    from penstock_operator.cluster.kube import Kube
    from penstock_operator.cluster.workqueue import WorkQueue

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_IDLE_SECONDS = 0.5
"""After so long kopf's task for an object ends. Its first LIST begins one for every object, and ten
thousand tasks that wait are 100 MiB."""
_EXIT_SECONDS = 20.0
"""After so long kopf kills the process that does not end: below a pod's 30 s of grace."""


class _Backoffs:
    """Waits of kopf between attempts, without end: an API server that is away is no reason to die.

    The longest is short: nothing wakes a service before the watch is back.
    """

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1.0, 2.0)
        while True:
            yield 5.0


class Watches:
    """Follows services and their objects.

    Args:
        kube: for the first LISTs.
        children: is kept up to date.
        queue: is woken.
        namespaces: that are served; none means all.
    """

    def __init__(
        self, kube: Kube, children: Children, queue: WorkQueue, *, namespaces: Iterable[str] = ()
    ) -> None:
        self.services: dict[Key, object] = {}
        """What is known of each service: enough to tell whether it changed."""
        self.primed = False
        self._kube = kube
        self._children = children
        self._queue = queue
        self._namespaces = tuple(namespaces)

    # --- the first look -----------------------------------------------------------------------

    async def prime(self) -> None:
        """Read everything, then wake every service. Tries again until it succeeds."""
        while not self.primed:
            try:
                for kind in WATCHED:
                    await self._list(kind)
                async for obj in self.objects(SERVICE):
                    self._note(obj)
            except ApiError as error:
                remedy = "; are its CRDs installed?" if error.status == 404 else ""
                log.warning("the cluster cannot be read yet: %s%s", error, remedy)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.primed = True
        for key in self.services:
            self._queue.wake(key, Wake.CHANGE)
        log.info(
            "%d services with %d objects are known", len(self.services), self._children.count()
        )

    async def _list(self, kind: Kind) -> None:
        async for obj in self.objects(kind):
            self._children.put(kind, obj)

    async def objects(self, kind: Kind) -> Any:
        """Yield all objects of a kind that are watched."""
        selector = "" if kind is SERVICE else labels.SERVICE
        for namespace in self._namespaces or ("",):
            async for page in self._kube.pages(kind, namespace=namespace, labels=selector):
                for obj in page.get("items") or []:
                    yield obj

    # --- events -------------------------------------------------------------------------------

    def service_event(self, kind: str | None, obj: Object) -> None:
        """Wake a service whose spec, or existence, changed: its status is our own writing."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        before = self.services.get(key)
        if kind == "DELETED":
            self.services.pop(key, None)
        else:
            self._note(obj)
        if kind == "DELETED" or self.services[key] != before:
            self._queue.wake(key, Wake.CHANGE)

    def child_event(self, kind: Kind, event: str | None, obj: Object) -> None:
        """Wake the service of an object that changed in a way that matters."""
        key: Key | None
        if event == "DELETED":
            meta = obj["metadata"]
            key = (meta["namespace"], meta["labels"][labels.SERVICE])
            if not self._children.remove(kind, key, meta["name"], meta["uid"]):
                return
        else:
            key = self._children.put(kind, obj)
        if key is not None and key in self.services:
            self._queue.wake(key, Wake.CHANGE)

    def _note(self, obj: Object) -> None:
        meta = obj["metadata"]
        self.services[meta["namespace"], meta["name"]] = identity_of(obj)

    # --- kopf ---------------------------------------------------------------------------------

    async def run(
        self, configuration: Any, *, ready: asyncio.Future[None], stop: asyncio.Future[None]
    ) -> None:
        """Watch until `stop`. Raises what ends kopf otherwise; the process should end then too.

        `ready` is done once kopf has taken over the signals of the process.
        """
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.networking.request_timeout = 60.0
        settings.networking.connect_timeout = 5.0
        settings.networking.error_backoffs = _Backoffs()
        settings.watching.connect_timeout = 5.0
        settings.watching.chunk_size = PAGE
        settings.queueing.idle_timeout = _IDLE_SECONDS
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.persistence.progress_storage = NoProgress()
        settings.process.ultimate_exiting_timeout = _EXIT_SECONDS
        for kind in WATCHED:
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = (
                labels.SERVICE
            )
        await kopf.operator(
            registry=self._registry(configuration),
            settings=settings,
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            ready_flag=ready,
            stop_flag=stop,
        )

    def _registry(self, configuration: Any) -> kopf.OperatorRegistry:
        """Return handlers for kopf, called by hand because its decorators have no types."""
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await connection_info(configuration)

        async def service(event: Any, **_: Any) -> None:
            self.service_event(event["type"], event["object"])

        kopf.on.login(registry=registry)(login)
        kopf.on.event(SERVICE.group, SERVICE.version, SERVICE.plural, registry=registry)(service)
        for kind in WATCHED:
            self._watch(kind, registry)
        return registry

    def _watch(self, kind: Kind, registry: kopf.OperatorRegistry) -> None:
        async def child(event: Any, **_: Any) -> None:
            self.child_event(kind, event["type"], event["object"])

        kopf.on.event(
            kind.group,
            kind.version,
            kind.plural,
            id=f"child-{kind.plural}",
            labels={labels.SERVICE: kopf.PRESENT},
            registry=registry,
        )(child)


def identity_of(obj: Object) -> object:
    """Return what changes when a reconcile of a service could come to something else."""
    meta = obj["metadata"]
    return meta["uid"], meta.get("generation"), meta.get("deletionTimestamp")
