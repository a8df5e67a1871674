"""Brings one service to where it should be: read, decide, act, tell.

Nothing is remembered that could not be read again: what this module keeps of a service only saves
questions that would be answered as before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from penstock_operator import manifests, planner, podspec
from penstock_operator.api import Router, Status
from penstock_operator.cluster.executor import Scene
from penstock_operator.cluster.kinds import SERVICE
from penstock_operator.cluster.mounts import mount_failures
from penstock_operator.cluster.observation import (
    observe_pods,
    observe_workloads,
    pods_of,
    targets_of,
    targets_of_what_runs,
)
from penstock_operator.cluster.pods import address, waits_for_volumes
from penstock_operator.cluster.polling import Answers, router_answer
from penstock_operator.cluster.sleep import may_sleep, shortest_idle
from penstock_operator.cluster.workqueue import Wake
from penstock_operator.errors import ApiRefused, LeaseLost, ManifestError, PenstockError
from penstock_operator.labels import ROLES
from penstock_operator.loader import parse_manifest
from penstock_operator.observed import converged
from penstock_operator.status import Observation, compute_status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock_operator.api import InferenceService
    from penstock_operator.cluster.children import Child, Children
    from penstock_operator.cluster.events import Events
    from penstock_operator.cluster.executor import Executor
    from penstock_operator.cluster.kinds import Key, Object
    from penstock_operator.cluster.kube import Kube
    from penstock_operator.cluster.polling import Depth
    from penstock_operator.errors import Problem
    from penstock_operator.observed import Pod, Workload

SOON_SECONDS = 2.0
"""Between questions to a service that changes: a person watches it."""
SETTLED_SECONDS = 10.0
"""Between questions to a service that is as it should be, or has been stuck for long."""
_NEXT_STEP_SECONDS = 0.2
"""Between a step of a rollout and a look at what is next."""
_PATIENCE_SECONDS = 120.0
"""After so long without news a service is asked as seldom as one that is settled."""


class Asker(Protocol):
    """Asks the processes of a service; `polling.Poller`."""

    async def ask(
        self, pods: Sequence[Child], before: Answers, *, router_port: int, depth: Depth
    ) -> Answers:
        """Return what the pods say."""
        ...


@dataclass(slots=True)
class _Memory:
    """What was found out about a service at its last reconcile."""

    answers: Answers = field(default_factory=Answers)
    settled: bool = False
    news_at: float = 0.0
    """Monotonic time of the last change of its status."""
    router_port: int = 0
    idle_limit: float | None = None
    """Seconds without requests after which a role goes to sleep; None: none does."""
    waits: bool = False
    """A pod waits for volumes, which only events tell about."""
    acted: bool = False
    """A step was taken, and the next one may be due: no event tells of what was done here."""
    fresh: bool = False
    """`answers` were asked for in this very reconcile."""


class Reconciler:
    """Reconciles services; give it to a `WorkQueue`."""

    def __init__(
        self,
        kube: Kube,
        children: Children,
        *,
        executor: Executor,
        asker: Asker,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._children = children
        self._executor = executor
        self._asker = asker
        self._events = events
        self._clock = clock
        self._now = now
        self._memories: dict[Key, _Memory] = {}

    async def __call__(self, key: Key, wake: Wake) -> float | None:
        """See `workqueue.Reconcile`. Raises ApiError and LeaseLost."""
        memory = self._memories.setdefault(key, _Memory(news_at=self._clock()))
        memory.fresh = False
        if wake == Wake.POLL and not await self._has_news(key, memory):
            return self._pause(key, memory)
        raw = await self._kube.get(SERVICE, *key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # Owner references have the objects deleted; nothing here keeps the service.
            del self._memories[key]
            self._executor.forget(key)
            return None
        try:
            service = _parse(raw)
        except ManifestError as error:
            await self._refuse(key, raw, error.problems)
        else:
            await self._reconcile(key, raw, service, memory, full=Wake.FULL in wake)
        return self._pause(key, memory)

    # --- a service that can be carried out ----------------------------------------------------

    async def _reconcile(
        self, key: Key, raw: Object, service: InferenceService, memory: _Memory, *, full: bool
    ) -> None:
        memory.router_port = service.spec.router.port
        children = self._children.of(key)
        pods = pods_of(children)
        await self._ask(pods, memory, "everything")
        mounts = await mount_failures(self._kube, key[0], pods)
        memory.waits = any(map(waits_for_volumes, pods))
        targets = targets_of(service, children)
        memory.idle_limit = shortest_idle(service, targets)
        scene = Scene(
            service=service,
            uid=raw["metadata"]["uid"],
            children=children,
            revisions={role: target.revision for role, target in targets.items()},
            full=full,
            loads=memory.answers.workers,
        )
        observation = Observation(
            targets=targets,
            workloads=observe_workloads(children),
            pods=observe_pods(
                children, service=service, answers=memory.answers.workers, mounts=mounts
            ),
            router=router_answer(memory.answers),
            model=service.spec.model.served_name,
            url=manifests.router_url(service),
        )
        failure: Exception | None = None
        memory.acted = False
        try:
            await self._act(scene, observation, raw)
        except LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001 - told in the status, and raised afterwards
            failure = error
        failure = failure or next(iter(scene.refusals), None)
        observation = _with_failure(observation, failure)
        status = await self._report(raw, observation, memory)
        memory.settled = _settled(observation, status)
        if failure is not None:
            raise failure

    async def _act(self, scene: Scene, seen: Observation, raw: Object) -> None:
        await self._executor.apply_shared(scene)
        steps = planner.plan(seen.targets, seen.workloads)
        self._memories[scene.key].acted = await self._executor.carry_out(scene, steps)
        keys = podspec.key_secret(scene.service)
        if any(pod.fault == "MountFailed" and keys in pod.message for pod in seen.pods):
            await self._executor.create_keys(scene)
        counts = {role: _count(seen.workloads, role) for role in ROLES}
        await self._executor.report_scalers(scene, counts)
        idle = self._memories[scene.key].answers.idle_seconds
        for role in may_sleep(scene.service, seen, _previous(raw), idle=idle, now=self._now()):
            await self._executor.put_to_sleep(scene, role)

    # --- a service that cannot ----------------------------------------------------------------

    async def _refuse(self, key: Key, raw: Object, problems: Sequence[Problem]) -> None:
        """Say why, and keep what runs as it is."""
        memory = self._memories[key]
        previous = _previous(raw)
        children = self._children.of(key)
        memory.router_port = _router_port(raw)
        await self._ask(pods_of(children), memory, "everything")
        workloads = observe_workloads(children)
        observation = Observation(
            targets=targets_of_what_runs(workloads),
            workloads=workloads,
            pods=observe_pods(children, service=None, answers=memory.answers.workers, mounts={}),
            router=router_answer(memory.answers),
            model=previous.model if previous else "",
            url=previous.url if previous else "",
            problems=problems,
        )
        await self._report(raw, observation, memory)
        memory.settled, memory.idle_limit, memory.acted = True, None, False

    # --- questions ----------------------------------------------------------------------------

    async def _has_news(self, key: Key, memory: _Memory) -> bool:
        """Ask a service's processes; return whether a whole reconcile is worth its price."""
        if memory.acted or memory.waits or not memory.router_port:
            return True
        before = memory.answers
        depth: Depth = "routers" if memory.settled else "everything"
        await self._ask(pods_of(self._children.of(key)), memory, depth)
        limit = memory.idle_limit
        return memory.answers.differ(before) or (
            limit is not None and memory.answers.idle_seconds >= limit
        )

    async def _ask(self, pods: Sequence[Child], memory: _Memory, depth: Depth) -> None:
        if memory.fresh:
            return
        memory.answers = await self._asker.ask(
            [pod for pod in pods if address(pod)],
            memory.answers,
            router_port=memory.router_port,
            depth=depth,
        )
        memory.fresh = True

    # --- telling ------------------------------------------------------------------------------

    async def _report(self, raw: Object, seen: Observation, memory: _Memory) -> Status:
        """Write the status if it is not what it was, and tell of conditions that flipped."""
        previous = _previous(raw)
        status = compute_status(
            seen,
            generation=int(raw["metadata"].get("generation") or 0),
            previous=previous,
            now=self._now().replace(microsecond=0),
        )
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        if body == raw.get("status"):
            return status
        meta = raw["metadata"]
        await self._kube.apply(
            {
                "apiVersion": SERVICE.api_version,
                "kind": SERVICE.name,
                "metadata": {n: meta[n] for n in ("name", "namespace", "uid")},
                "status": body,
            },
            "status",
        )
        memory.news_at = self._clock()
        await self._events.tell(raw, previous, status)
        return status

    def _pause(self, key: Key, memory: _Memory) -> float | None:
        """Return after how many seconds to ask again."""
        if memory.acted:
            return _NEXT_STEP_SECONDS
        pods = pods_of(self._children.of(key))
        if not memory.waits and not any(map(address, pods)):
            return None
        stale = self._clock() - memory.news_at > _PATIENCE_SECONDS
        return SETTLED_SECONDS if memory.settled or stale else SOON_SECONDS


# --- pure parts -------------------------------------------------------------------------------


def _parse(raw: Object) -> InferenceService:
    """Return the service. Raises ManifestError for one that cannot be carried out."""
    kept = {name: value for name, value in raw.items() if name != "status"}
    return parse_manifest(kept)


def _router_port(raw: Object) -> int:
    """Return the port of a router whose manifest is refused."""
    spec = raw.get("spec")
    router = spec.get("router") if isinstance(spec, dict) else None
    port = router.get("port") if isinstance(router, dict) else None
    return port if isinstance(port, int) and 0 < port < 65536 else Router().port


def _previous(raw: Object) -> Status | None:
    """Return the status that is stored, None if there is none that this release understands."""
    try:
        return Status.model_validate(raw["status"]) if raw.get("status") else None
    except ValueError:
        return None


def _with_failure(seen: Observation, failure: Exception | None) -> Observation:
    if failure is None:
        return seen
    return replace(seen, failure=_told(failure))


def _told(failure: Exception) -> str:
    if not isinstance(failure, PenstockError):
        return f"the operator failed, see its log: {type(failure).__name__}: {failure}"
    return str(failure) if isinstance(failure, ApiRefused) else f"{failure}; it is tried again"


def _settled(seen: Observation, status: Status) -> bool:
    """Whether only the routers are still worth asking."""
    if status.condition("Ready").status != "True" or not converged(seen.targets, seen.workloads):
        return False
    told = all(map(_told_all, seen.of("decode")))
    return told and not any(pod.fault for pod in seen.pods)


def _told_all(pod: Pod) -> bool:
    """Whether a decode worker has said all that it will say as long as nothing changes."""
    return pod.state != "ready" or bool(pod.transport)


def _count(workloads: Sequence[Workload], role: str) -> int:
    return sum(workload.replicas for workload in workloads if workload.role == role)
