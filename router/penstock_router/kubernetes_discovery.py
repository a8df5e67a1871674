"""Discovery in a cluster: the pods that a label selector finds, by LIST and then WATCH.

    no version known ──LIST──► pods, version ──WATCH from version──► events, newer versions
            ▲                                        │
            └── 410 Gone, a refusal, garbage ────────┤
                     WATCH again ◄── the server ended it, or the connection broke

The server is asked to end each watch after `watch_seconds`; a watch that has not ended a little
later has lost its connection without a word. So a dead connection is noticed within a minute, and
a bookmark at the end of each watch keeps the version young. While the API cannot be reached the
last list stands: workers go on working without it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct, field

from penstock_router.discovery import Endpoint
from penstock_router.errors import ConfigurationError, KubernetesError, KubernetesGarbage
from penstock_router.kubernetes_api import decode, lines
from penstock_wire.names import split_address

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator, AsyncIterator

    import httpx

    from penstock_router.kubernetes_api import KubernetesApi

log = logging.getLogger(__name__)

CONTROL_PORT = 7000
"""Of every worker pod."""
_ROLE = "penstock.dev/role"
_GROUP = "penstock.dev/group"
_REVISION = "penstock.dev/revision"
_STAGE = "apps.kubernetes.io/pod-index"

_PAGE = 250
_MOST_PODS = 20_000
"""Of one service; more is somebody else's selector."""
_GRACE_SECONDS = 10.0
"""How much later than asked a server may end a watch."""
_GONE = 410

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_STAGE_NUMBER = re.compile(r"[0-9]{1,4}")
_SELECTOR = re.compile(r"[A-Za-z0-9./=_-]+")


class Timing(Struct, frozen=True, kw_only=True):
    """Times of a watch, in seconds."""

    watch: float = 40.0
    """After so long the server is to end a watch. With the grace a dead connection is noticed
    within 50 s; a new watch costs the server as much as one event."""
    pause: float = 1.0
    """Least time between the starts of two watches, and the first wait after a failure."""
    longest_pause: float = 10.0
    """Waits double up to this: an API server that comes back is noticed within 10 s."""


class PodSet(Struct, frozen=True):
    """Which pods are workers: a namespace and a label selector."""

    namespace: str
    selector: str

    @classmethod
    def parse(cls, text: str) -> PodSet:
        """Return what NAMESPACE/LABEL=VALUE means. Raises ConfigurationError."""
        namespace, _, selector = text.partition("/")
        if not _NAMESPACE.fullmatch(namespace) or not _SELECTOR.fullmatch(selector):
            raise ConfigurationError(
                f"--discovery kubernetes:{text} is malformed; write "
                "kubernetes:NAMESPACE/penstock.dev/service=NAME"
            )
        return cls(namespace, selector)

    @property
    def path(self) -> str:
        """Of the pods in the API."""
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @property
    def label_selector(self) -> str:
        """The selector, and only pods that are workers."""
        return f"{self.selector},{_ROLE} in (decode,prefill)"


# --- what the API says: any field may be absent or null ---------------------------------------


class _Metadata(Struct):
    name: str | None = None
    version: str | None = field(name="resourceVersion", default=None)
    labels: dict[str, str] | None = None


class _PodStatus(Struct):
    phase: str | None = None
    ip: str | None = field(name="podIP", default=None)


class _Pod(Struct):
    metadata: _Metadata
    status: _PodStatus | None = None


class _ListMetadata(Struct):
    version: str = field(name="resourceVersion")
    following: str | None = field(name="continue", default=None)


class _PodList(Struct):
    kind: Literal["PodList"]
    metadata: _ListMetadata
    items: list[_Pod] | None = None


class _Event(Struct):
    type: str
    object: msgspec.Raw


class _Refusal(Struct):
    code: int | None = None
    message: str | None = None


class UnusablePod(ValueError):  # noqa: N818 - it names the state
    """A worker pod that lacks what a worker pod has; the message says what."""


def endpoint_of(pod: _Pod) -> Endpoint | None:
    """Return the worker that runs in a pod, None while none can. Raises UnusablePod."""
    labels = pod.metadata.labels or {}
    status = pod.status or _PodStatus()
    if labels.get(_ROLE) not in {"decode", "prefill"}:
        return None
    if not status.ip or status.phase in {"Succeeded", "Failed"}:
        return None
    host = f"[{status.ip}]" if ":" in status.ip else status.ip
    prefill = labels[_ROLE] == "prefill"
    stage = labels.get(_STAGE, "0") if prefill else "0"
    if prefill and not labels.get(_GROUP):
        raise UnusablePod(f"it has no label {_GROUP}")
    if not _STAGE_NUMBER.fullmatch(stage):
        raise UnusablePod(f"its label {_STAGE} is {stage!r}, not a number")
    found: dict[str, Any] = {
        "name": pod.metadata.name,
        "role": labels[_ROLE],
        "address": f"{host}:{CONTROL_PORT}",
        "group": labels.get(_GROUP, "") if prefill else "",
        "stage": int(stage),
        "revision": labels.get(_REVISION, ""),
    }
    try:
        endpoint = msgspec.convert(found, Endpoint)
        split_address(endpoint.address)
    except ValueError as error:  # msgspec.ValidationError is one
        raise UnusablePod(str(error)) from error
    return endpoint


class KubernetesDiscovery:
    """Follows the pods of a service.

    Args:
        api: the API server.
        pods: which pods.
        rng: spreads the attempts of many routers after an outage.
        timing: see there.
    """

    def __init__(
        self,
        api: KubernetesApi,
        pods: PodSet,
        *,
        rng: random.Random,
        timing: Timing = Timing(),  # noqa: B008 - frozen
    ) -> None:
        self._api = api
        self._pod_set = pods
        self._rng = rng
        self._timing = timing
        self._version = ""
        """The version that a watch goes on from; empty: a LIST is needed."""
        self._found: dict[str, Endpoint] = {}
        self._failures = 0
        self._unusable: dict[str, str] = {}
        self.problem = ""

    async def watch(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        """Yield the list at first and after every change of it; nothing while it is unknown."""
        loop = asyncio.get_running_loop()
        told: tuple[Endpoint, ...] | None = None
        while True:
            again = loop.time() + self._timing.pause
            try:
                async with aclosing(self._cycle()) as lists:
                    async for found in lists:
                        if found != told:
                            told = found
                            yield found
            except KubernetesError as error:
                if error.status or isinstance(error, KubernetesGarbage):
                    self._version = ""  # what was said since is not known
                if error.status != _GONE:
                    again = loop.time() + self._failed(error)
            await asyncio.sleep(max(0.0, again - loop.time()))

    def _failed(self, error: KubernetesError) -> float:
        """Note a failure, and return how many seconds to wait after it."""
        if not self.problem:
            log.warning("workers stay as they were: %s", error)
        self.problem = str(error)
        pause = self._timing.pause * float(2 ** min(self._failures, 10))
        self._failures += 1
        return min(self._timing.longest_pause, pause) * self._rng.uniform(0.5, 1.0)

    def _works(self) -> None:
        if self.problem:
            log.info("the Kubernetes API answers again; workers are followed")
        self.problem = ""
        self._failures = 0

    async def _cycle(self) -> AsyncGenerator[tuple[Endpoint, ...]]:
        """Make one watch, after a LIST if one is needed. Raises KubernetesError."""
        async with self._api.client() as client:
            if not self._version:
                pods, version = await self._list(client)
                self._found, self._version = self._endpoints(pods), version
                self._works()
                yield self._sorted()
            async with aclosing(self._events(client)) as events:
                async for event in events:
                    self._apply(event)
                    yield self._sorted()

    async def _list(self, client: httpx.AsyncClient) -> tuple[list[_Pod], str]:
        """Return all pods, and the version at which they are all there are."""
        found: list[_Pod] = []
        following = ""
        while True:
            params = {"labelSelector": self._pod_set.label_selector, "limit": str(_PAGE)}
            if following:
                params["continue"] = following
            body = await self._api.request(client, "GET", self._pod_set.path, params=params)
            page = decode(body, _PodList, "the list of pods")
            found += page.items or ()
            if not page.metadata.version:
                raise KubernetesGarbage("the list of pods has no resourceVersion")
            if len(found) > _MOST_PODS:
                raise KubernetesGarbage(f"there are over {_MOST_PODS} pods of one service")
            following = page.metadata.following or ""
            if not following:
                return found, page.metadata.version

    async def _events(self, client: httpx.AsyncClient) -> AsyncGenerator[_Event]:
        params = {
            "labelSelector": self._pod_set.label_selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, round(self._timing.watch))),
        }
        loop = asyncio.get_running_loop()
        async with self._api.stream(client, self._pod_set.path, params) as response:
            self._works()
            until = loop.time() + self._timing.watch + _GRACE_SECONDS
            async with aclosing(lines(response, until=until)) as found:
                async for line in found:
                    yield decode(line, _Event, "a watch event")

    def _apply(self, event: _Event) -> None:
        """Take over one event. Raises KubernetesError, after which a LIST is needed."""
        if event.type == "ERROR":
            refusal = decode(bytes(event.object), _Refusal, "a watch error")
            raise KubernetesError(
                f"the watch of pods ended: {refusal.message or 'no reason given'}",
                status=refusal.code or 500,
            )
        pod = decode(bytes(event.object), _Pod, f"a pod of the event {event.type}")
        name = pod.metadata.name
        if event.type == "DELETED" and name:
            self._found.pop(name, None)
        elif event.type in {"ADDED", "MODIFIED"} and name:
            self._found.pop(name, None)
            self._found |= self._endpoints([pod])
        if pod.metadata.version:
            self._version = pod.metadata.version

    def _endpoints(self, pods: list[_Pod]) -> dict[str, Endpoint]:
        found: dict[str, Endpoint] = {}
        for pod in pods:
            try:
                endpoint = endpoint_of(pod)
            except UnusablePod as error:
                self._tell_unusable(pod.metadata.name or "", str(error))
                continue
            if endpoint is not None:
                found[endpoint.name] = endpoint
        return found

    def _tell_unusable(self, name: str, why: str) -> None:
        """Say once what is wrong with a pod; the others count."""
        if self._unusable.get(name) != why:
            if len(self._unusable) >= _MOST_PODS:
                self._unusable.clear()
            self._unusable[name] = why
            log.warning("the worker pod %s is left out: %s", name, why)

    def _sorted(self) -> tuple[Endpoint, ...]:
        return tuple(self._found[name] for name in sorted(self._found))
