"""A cluster in memory that runs step by step: the operator, controllers, kubelets, routers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from penstock_operator import labels
from penstock_operator.api import Status
from penstock_operator.cluster import kinds
from penstock_operator.cluster.children import Children, child_of
from penstock_operator.cluster.events import Events
from penstock_operator.cluster.executor import Executor
from penstock_operator.cluster.kube import Kube
from penstock_operator.cluster.metrics import Metrics
from penstock_operator.cluster.pods import WorkerAnswer, role_of, state_of
from penstock_operator.cluster.polling import Answers, RouterPod
from penstock_operator.cluster.reconcile import Reconciler
from penstock_operator.cluster.watches import Watches
from penstock_operator.cluster.workqueue import Wake
from penstock_operator.errors import LeaseLost, PenstockError
from tests.unit.operator_cluster.fake_api import FakeApi

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock_operator.cluster.children import Child
    from penstock_operator.cluster.kinds import Key, Object

START = datetime(2030, 1, 1, tzinfo=UTC)
MODEL = {"uri": "file:///models/tiny"}


@dataclass
class Lease:
    """A guard that tests can take away."""

    held: bool = True

    def write_seconds(self) -> float:
        if not self.held:
            raise LeaseLost("taken away by the test")
        return 15.0


@dataclass
class Wakes:
    """Stands for the work queue: `World` takes from it."""

    waiting: dict[Key, Wake] = field(default_factory=dict)

    def wake(self, key: Key, why: Wake) -> None:
        self.waiting[key] = self.waiting.get(key, Wake(0)) | why


class World:
    """Everything. `step` lets two seconds pass."""

    def __init__(self) -> None:
        self.api = FakeApi()
        self.lease = Lease()
        self.seconds = 0.0
        self.idle = 0.0
        """What routers say of the time since the last request."""
        self.drain_steps = 2
        """How long a pod takes to end."""
        self.broken: Callable[[Object], Object | None] = lambda pod: None
        """Returns the status of a pod that does not come up."""
        self.failures: list[str] = []
        self._draining: dict[str, int] = {}
        self._delivered = 0
        self.start_operator()

    # --- the operator -------------------------------------------------------------------------

    def start_operator(self) -> None:
        """Start it, or start it again: it then knows nothing."""
        kube = Kube(self.api, self.lease)
        self.children = Children()
        self.metrics = Metrics()
        self.wakes = Wakes()
        self.watches = Watches(kube, self.children, self.wakes)  # type: ignore[arg-type]
        self.reconciler = Reconciler(
            kube,
            self.children,
            executor=Executor(kube, self.children),
            asker=self,
            events=Events(kube, identity="op", metrics=self.metrics, clock=self.clock),
            clock=self.clock,
            now=lambda: START + timedelta(seconds=self.seconds),
        )
        self._timers: dict[Key, float] = {}

    async def restart(self) -> None:
        self.start_operator()
        self._delivered = len(self.api.events)
        await self.watches.prime()

    def clock(self) -> float:
        return self.seconds

    def deliver(self) -> None:
        """Let watches tell of everything that happened."""
        while self._delivered < len(self.api.events):
            kind, event, obj = self.api.events[self._delivered]
            self._delivered += 1
            if kind is kinds.SERVICE:
                self.watches.service_event(event, obj)
            elif kind in kinds.WATCHED and labels.SERVICE in obj["metadata"].get("labels", {}):
                self.watches.child_event(kind, event, obj)

    async def operate(self) -> None:
        """Reconcile what was woken, and what wants to come again."""
        self.deliver()
        for key, when in list(self._timers.items()):
            if when <= self.seconds:
                del self._timers[key]
                self.wakes.wake(key, Wake.POLL)
        waiting, self.wakes.waiting = self.wakes.waiting, {}
        for key, why in waiting.items():
            await self.reconcile(key, why)

    async def reconcile(self, key: Key, why: Wake) -> None:
        try:
            again = await self.reconciler(key, why)
        except LeaseLost:
            raise
        except PenstockError as error:
            self.failures.append(str(error))
            self.wakes.wake(key, why | Wake.CHANGE)
        else:
            if again is not None:
                self._timers[key] = self.seconds + again

    # --- polling.Poller -----------------------------------------------------------------------

    async def ask(
        self, pods: Sequence[Child], before: Answers, *, router_port: int, depth: Any
    ) -> Answers:
        del before, router_port, depth
        every = [child_of(kinds.POD, pod) for pod in self.api.of(kinds.POD)]
        ready = [pod for pod in every if state_of(pod) == "ready"]
        groups = self._whole_groups(every)
        workers, routers = {}, []
        for pod in pods:
            if role_of(pod) == "router":
                works = any(role_of(p) == "decode" for p in ready)
                routers.append(
                    RouterPod(
                        name=pod.name,
                        ready=works,
                        message="" if works else "no decode worker is ready",
                        idle_seconds=self.idle,
                        accepting=pod in ready,
                    )
                )
            elif pod in ready:
                links = groups if role_of(pod) == "decode" else None
                workers[pod.uid] = WorkerAnswer(transport="tcp", groups_ready=links)
            else:
                workers[pod.uid] = WorkerAnswer(progress=0.5, message="loading weights")
        return Answers(workers, tuple(routers))

    @staticmethod
    def _whole_groups(pods: Sequence[Child]) -> frozenset[str]:
        groups = {pod.labels.get(labels.GROUP, "") for pod in pods} - {""}
        own = {group: [p for p in pods if p.labels.get(labels.GROUP) == group] for group in groups}
        return frozenset(g for g in groups if all(state_of(p) == "ready" for p in own[g]))

    # --- controllers and kubelets -------------------------------------------------------------

    def run_controllers(self) -> None:
        for workload in (*self.api.of(kinds.STATEFUL_SET), *self.api.of(kinds.DEPLOYMENT)):
            self._make_pods(workload)
        for pod in self.api.of(kinds.POD):
            self._live(pod)

    def _pods_of(self, workload: Object) -> list[Object]:
        uid = workload["metadata"]["uid"]
        return [
            pod
            for pod in self.api.of(kinds.POD)
            if pod["metadata"]["ownerReferences"][0]["uid"] == uid
        ]

    def _make_pods(self, workload: Object) -> None:
        name, wanted = workload["metadata"]["name"], workload["spec"]["replicas"]
        active = [p for p in self._pods_of(workload) if "deletionTimestamp" not in p["metadata"]]
        for pod in sorted(active, key=_keep_first)[wanted:]:
            self.api.terminate(("pods", pod["metadata"]["namespace"], pod["metadata"]["name"]))
        for number in range(wanted):
            pod_name = f"{name}-{number}"
            where = ("pods", workload["metadata"]["namespace"], pod_name)
            if where not in self.api.stored and len(active) < wanted:
                active.append(self._pod(workload, pod_name, number))

    def _pod(self, workload: Object, name: str, number: int) -> Object:
        template = copy.deepcopy(workload["spec"]["template"])
        template["metadata"]["labels"][labels.POD_INDEX] = str(number)
        meta = {
            **template["metadata"],
            "name": name,
            "namespace": workload["metadata"]["namespace"],
            "ownerReferences": [
                {
                    "apiVersion": "apps/v1",
                    "kind": workload["kind"],
                    "name": workload["metadata"]["name"],
                    "uid": workload["metadata"]["uid"],
                    "controller": True,
                }
            ],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        pod["spec"]["nodeName"] = "node"
        return self.api.put(kinds.POD, {**pod, "status": {"phase": "Pending"}}, "controller")

    def _live(self, pod: Object) -> None:
        meta = pod["metadata"]
        where = ("pods", meta["namespace"], meta["name"])
        if "deletionTimestamp" in meta:
            left = self._draining.get(meta["uid"], self.drain_steps) - 1
            self._draining[meta["uid"]] = left
            if left <= 0:
                self.api.remove(where)
            return
        status = self.broken(pod) or _next_status(pod.get("status", {}))
        self.api.change(where, lambda obj: obj.update(status=status), "kubelet")

    # --- time ---------------------------------------------------------------------------------

    async def step(self) -> None:
        await self.operate()
        self.run_controllers()
        self.seconds += 2.0

    async def run(self, steps: int = 40) -> None:
        for _ in range(steps):
            await self.step()

    async def settle(self, steps: int = 200) -> None:
        """Run until nothing is written any more."""
        quiet = 0
        for _ in range(steps):
            before = len(self.api.events)
            await self.step()
            quiet = quiet + 1 if len(self.api.events) == before else 0
            if quiet > 8 and not self.wakes.waiting:
                return
        raise AssertionError(f"no end after {steps} steps; failures: {self.failures[-3:]}")

    # --- services -----------------------------------------------------------------------------

    def apply(self, name: str = "chat", **spec: Any) -> None:
        """Apply a manifest as a person does."""
        self.api.put(
            kinds.SERVICE,
            {
                "apiVersion": kinds.SERVICE.api_version,
                "kind": kinds.SERVICE.name,
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"model": MODEL, **spec},
                **self._old_status(name),
            },
            "kubectl",
        )

    def _old_status(self, name: str) -> Object:
        found = self.api.stored.get(("inferenceservices", "default", name))
        return {"status": found.obj["status"]} if found and "status" in found.obj else {}

    def status(self, name: str = "chat") -> Status:
        return Status.model_validate(self.api.get(kinds.SERVICE, name)["status"])

    def verdict(self, condition: str = "Ready", name: str = "chat") -> tuple[str, str, str]:
        found = self.status(name).condition(condition)
        return found.status, found.reason, found.message

    def names(self, kind: kinds.Kind) -> list[str]:
        return [obj["metadata"]["name"] for obj in self.api.of(kind)]


def _keep_first(pod: Object) -> tuple[int, int]:
    """Order in which a controller keeps pods: ready before others, then the dearest."""
    ready = any(c["type"] == "Ready" for c in pod.get("status", {}).get("conditions", []))
    cost = pod["metadata"].get("annotations", {}).get(labels.DELETION_COST, "0")
    return -int(ready), -int(cost)


def _next_status(status: Object) -> Object:
    """Pending, then running, then ready."""
    if status["phase"] == "Pending":
        state: Object = {"running": {}}
        return {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "containerStatuses": [
                {"name": "main", "ready": False, "restartCount": 0, "state": state, "lastState": {}}
            ],
            "conditions": [],
        }
    containers = [{**c, "ready": True} for c in status["containerStatuses"]]
    return {
        **status,
        "containerStatuses": containers,
        "conditions": [{"type": "Ready", "status": "True"}],
    }
