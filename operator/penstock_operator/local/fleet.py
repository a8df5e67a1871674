"""The workloads of one machine: rendered objects, and the pods that run for them.

It stands where the API server, its controllers and the kubelets stand in a cluster: objects come
and go by planner actions, and pods follow the objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock_operator import labels, manifests
from penstock_operator.local.kubelet import Identity, launch
from penstock_operator.local.pod import LocalPod
from penstock_operator.observed import Workload
from penstock_operator.planner import Create, Delete, Scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import httpx

    from penstock_operator.api import InferenceService
    from penstock_operator.labels import Role
    from penstock_operator.local.kubelet import Surroundings
    from penstock_operator.local.logs import Terminal
    from penstock_operator.local.network import LoopbackNetwork
    from penstock_operator.local.settings import LocalSettings
    from penstock_operator.local.state import StateDir
    from penstock_operator.manifests import Object
    from penstock_operator.planner import Action

_INPUTS = manifests.Inputs()


@dataclass(slots=True)
class _Running:
    """An object and its pods, oldest first."""

    role: Role
    index: int
    manifest: Object
    pods: list[LocalPod] = field(default_factory=list)

    @property
    def label(self) -> dict[str, str]:
        found: dict[str, str] = self.manifest["metadata"]["labels"]
        return found

    @property
    def replicas(self) -> int:
        return int(self.manifest["spec"]["replicas"])


class Fleet:
    """Owns every pod of the service. All methods are for the supervisor's event loop."""

    def __init__(
        self,
        *,
        state: StateDir,
        settings: LocalSettings,
        network: LoopbackNetwork,
        client: httpx.AsyncClient,
        terminal: Terminal,
        on_change: Callable[[], None],
    ) -> None:
        self._state = state
        self._settings = settings
        self._network = network
        self._client = client
        self._terminal = terminal
        self._on_change = on_change
        self._workloads: dict[str, _Running] = {}
        self._leaving: list[tuple[_Running, LocalPod]] = []
        self._published: tuple[dict[str, str], list[dict[str, object]]] | None = None

    # --- what there is ------------------------------------------------------------------------

    def pods(self) -> list[LocalPod]:
        """Return all pods, those that drain too, in the order of their names."""
        found = [*self._active(), *(pod for _, pod in self._leaving)]
        return sorted(found, key=lambda pod: _natural(pod.launch.identity))

    def workloads(self) -> list[Workload]:
        """Return what the planner plans from."""
        seen = [_observe(name, running) for name, running in self._workloads.items()]
        names = set(self._workloads)
        for running, pod in self._leaving:
            name = pod.launch.identity.workload
            if running.role == "prefill" and name not in names:
                names.add(name)
                seen.append(_observe(name, running, replicas=0))
        return seen

    def router(self) -> LocalPod | None:
        """Return the router that speaks for the service: a ready one if there is one."""
        routers = [pod for pod in self._active() if pod.launch.identity.role == "router"]
        return max(routers, key=lambda pod: pod.ready, default=None)

    # --- changes ------------------------------------------------------------------------------

    def apply(self, service: InferenceService, actions: Sequence[Action]) -> None:
        """Change the objects as the planner says; `reconcile` then makes pods follow."""
        for action in actions:
            match action:
                case Create("prefill", _, index):
                    manifest = manifests.prefill_group(service, index, _INPUTS)
                    self._add("prefill", index, manifest)
                case Create(role, replicas, _):
                    self._add(role, 0, manifests.deployment(service, role, replicas, _INPUTS))
                case Scale(name, replicas):
                    self._workloads[name].manifest["spec"]["replicas"] = replicas
                case Delete(name):
                    running = self._workloads.pop(name)
                    for pod in running.pods:
                        self._dismiss(running, pod)

    def _add(self, role: Role, index: int, manifest: Object) -> None:
        self._workloads[manifest["metadata"]["name"]] = _Running(role, index, manifest)

    def reconcile(self, service: InferenceService, around: Surroundings) -> None:
        """Start and dismiss pods until each object has as many as it asks for."""
        for entry in [entry for entry in self._leaving if entry[1].stopped]:
            self._leaving.remove(entry)
            self._network.release(entry[1].launch.identity.address)
        for name, running in self._workloads.items():
            surplus = len(running.pods) - running.replicas
            for pod in sorted(running.pods, key=_worth)[: max(0, surplus)]:
                running.pods.remove(pod)
                self._dismiss(running, pod)
            for stage in range(len(running.pods), running.replicas):
                identity = self._identity(service, name, running, stage)
                running.pods.append(self._start(running, identity, around))

    def publish(self, service: InferenceService) -> None:
        """Write the names for workers and the workers for the router, when they have changed.

        Whoever reads them again and again sees by the file that there is nothing to read.
        """
        domain = f"{service.name}-workers.{service.metadata.namespace}.svc"
        identities = [pod.launch.identity for pod in self.pods()]
        hosts = {f"{identity.name}.{domain}": identity.address for identity in identities}
        found = hosts, self._endpoints()
        if found == self._published:
            return
        self._state.write(self._state.hosts_file, hosts)
        self._state.write(self._state.endpoints_file, {"endpoints": found[1]})
        self._published = found

    def _endpoints(self) -> list[dict[str, object]]:
        """Running workers, ready or not: the router learns their state from themselves."""
        return [
            {
                "name": pod.launch.identity.name,
                "role": pod.launch.identity.role,
                "group": pod.launch.group,
                "stage": pod.launch.identity.stage,
                "address": pod.launch.control,
                "revision": pod.launch.revision,
                "http": pod.launch.http,
            }
            for pod in self.pods()
            if pod.launch.control and pod.pid is not None
        ]

    def _identity(
        self, service: InferenceService, workload: str, running: _Running, stage: int
    ) -> Identity:
        prefix = f"{service.name}-"
        if running.role == "prefill":
            name = f"{workload}-{stage}"
        else:
            taken = {pod.launch.identity.name for pod in self.pods()}
            numbers = (f"{prefix}{running.role}-{number}" for number in range(len(taken) + 1))
            name = next(candidate for candidate in numbers if candidate not in taken)
            stage = 0
        return Identity(
            name=name,
            short=name.removeprefix(prefix),
            namespace=service.metadata.namespace,
            role=running.role,
            workload=workload,
            address=self._network.allocate(),
            stage=stage,
        )

    def _start(self, running: _Running, identity: Identity, around: Surroundings) -> LocalPod:
        return LocalPod(
            launch(running.manifest["spec"]["template"], identity, around),
            settings=self._settings,
            client=self._client,
            terminal=self._terminal,
            log_file=self._state.log_file(identity.short),
            on_change=self._on_change,
        )

    def _dismiss(self, running: _Running, pod: LocalPod) -> None:
        pod.stop(pod.launch.grace)
        self._leaving.append((running, pod))

    def _active(self) -> Iterator[LocalPod]:
        for running in self._workloads.values():
            yield from running.pods


def _observe(name: str, running: _Running, *, replicas: int | None = None) -> Workload:
    ready = sum(pod.ready for pod in running.pods)
    if running.role == "prefill":
        whole = ready == running.replicas == len(running.pods)
        wanted, ready = 1, int(whole)
    else:
        wanted = running.replicas
    if replicas is not None:
        wanted, ready = replicas, 0
    return Workload(
        name=name,
        role=running.role,
        revision=running.label[labels.REVISION],
        layout=running.label[labels.LAYOUT],
        index=running.index,
        replicas=wanted,
        ready=min(ready, wanted),
    )


def _worth(pod: LocalPod) -> tuple[bool, float]:
    """Least worth keeping first: not ready, then youngest."""
    return pod.ready, -(pod.ready_since or 0.0)


def _natural(identity: Identity) -> tuple[int, list[int]]:
    numbers = [int(part) for part in identity.short.split("-") if part.isdigit()]
    return labels.ROLES.index(identity.role), numbers
