"""InferenceServices of the demo model, and what tests ask of them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from e2e.cluster.waiting import until
from e2e.images.build import ROOT
from e2e.load import Load

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl
    from e2e.namespaces import Namespaces
    from e2e.release import Release

Object = dict[str, Any]
MODEL = "penstock-demo"
READY_SECONDS = 240
"""Four workers import torch on two cores."""
_DEMO = ROOT / "operator" / "penstock_operator" / "local" / "demo"
_KINDS = (
    "pods,statefulsets,deployments,replicasets,services,secrets,serviceaccounts,roles,rolebindings,"
    "networkpolicies,poddisruptionbudgets,rolescalers"
)
"""All that an operator makes for a service."""
_SMALL = {"extraArgs": ["--threads", "1"]}


def demo_spec(model: Path) -> Object:
    """Return a spec of the demo model at `model` on the nodes, with little use of the machine."""
    return {
        "model": {"uri": model.as_uri(), "name": MODEL, "dtype": "float32"},
        "prefill": {"replicas": 1, "pipelineParallel": 2, **copy.deepcopy(_SMALL)},
        "decode": {"replicas": 2, **copy.deepcopy(_SMALL)},
        "router": {"replicas": 1},
        "kvCache": {"memory": "64Mi"},
    }


@dataclass(frozen=True, slots=True)
class Services:
    """Makes InferenceServices."""

    cluster: Cluster
    release: Release
    namespaces: Namespaces
    _made: list[Service] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete all that were made. Raises NotInTimeError.

        Before their namespaces: Kubernetes ends a namespace's pods before anything else, and looks
        again only after half of the longest time that they may take to drain.
        """
        for service in [*self._made]:
            self.remove(service)

    def remove(self, service: Service) -> None:
        """Delete a service and wait until its pods have ended. Raises NotInTimeError."""
        self._made.remove(service)
        service.delete()
        service.wait_until_gone(READY_SECONDS)

    def create(self, purpose: str, *, name: str = "demo") -> Service:
        """Return a service, not yet applied, in a new namespace named after `purpose`."""
        return self.add(self.namespaces.create(purpose), name)

    def add(self, namespace: str, name: str) -> Service:
        """Return a service, not yet applied, in a namespace that exists."""
        model = self.place_model(namespace)
        service = Service(self.cluster.kubectl, namespace, name, demo_spec(model))
        self._made.append(service)
        return service

    def place_model(self, folder: str) -> Path:
        """Put a copy of the demo model where pods of all nodes find it, and return its path."""
        path = self.cluster.settings.models / folder / MODEL
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(_DEMO, path)
        return path


@dataclass(frozen=True, slots=True)
class Service:
    """One InferenceService. Change `spec`, then `apply`."""

    kubectl: Kubectl
    namespace: str
    name: str
    spec: Object = field(hash=False)

    def apply(self) -> None:
        """Apply it as a person does, by `kubectl apply`."""
        manifest = {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": self.spec,
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def delete(self) -> None:
        """Delete it, without waiting."""
        self.run("delete", "inferenceservice", self.name, "--wait=false", "--ignore-not-found")

    def wait_until_gone(self, seconds: float = 120) -> None:
        """Return when nothing of it is left. Raises NotInTimeError naming what is."""

        def look() -> bool:
            left = self.run("get", _KINDS, f"--selector=penstock.dev/service={self.name}", "-oname")
            assert not left, " ".join(left.split())
            return True

        until(f"nothing of {self.namespace}/{self.name} is left", look, seconds=seconds)

    def run(self, *arguments: str) -> str:
        """Run kubectl in its namespace and return what it printed."""
        return self.kubectl("--namespace", self.namespace, *arguments).stdout

    def items(self, kind: str, *arguments: str) -> list[Object]:
        """Return the objects of a kind that belong to it."""
        selector = f"--selector=penstock.dev/service={self.name}"
        found = self.kubectl.get(kind, "--namespace", self.namespace, selector, *arguments)
        items: list[Object] = found["items"]
        return items

    def pods(self, role: str | None = None) -> list[Object]:
        """Return its pods, or those of a role, that are not about to end."""
        return [
            pod
            for pod in self.items("pods")
            if "deletionTimestamp" not in pod["metadata"]
            and (role is None or pod["metadata"]["labels"]["penstock.dev/role"] == role)
        ]

    # --- status -------------------------------------------------------------------------------

    def read(self) -> Object:
        """Return the object as the API server has it."""
        found: Object = self.kubectl.get(
            "inferenceservice", self.name, "--namespace", self.namespace
        )
        return found

    def conditions(self) -> dict[str, Object]:
        """Return its conditions by type; those of an older generation are left out."""
        live = self.read()
        return {
            condition["type"]: condition
            for condition in live.get("status", {}).get("conditions", [])
            if condition["observedGeneration"] == live["metadata"]["generation"]
        }

    def wait_for(
        self,
        condition: str = "Ready",
        status: str = "True",
        *,
        reason: str | None = None,
        says: str = "",
        seconds: float = READY_SECONDS,
    ) -> Object:
        """Return a condition once it has this status (and reason, and `says` in its message).

        Raises NotInTimeError with what the conditions were last.
        """

        def look() -> Object | None:
            found = self.conditions()
            own = found.get(condition, {})
            assert own.get("status") == status, self._told(found)
            assert reason is None or own["reason"] == reason, self._told(found)
            assert says in own["message"], self._told(found)
            return own

        what = f"{condition} of {self.namespace}/{self.name} is {status} {reason or ''} {says}"
        return until(what, look, seconds=seconds, every=0.5)

    def wait_until_settled(self, seconds: float = READY_SECONDS) -> None:
        """Return when it is Ready and everything is as the spec says, and no rollout under way."""
        self.wait_for("Ready", seconds=seconds)
        self.wait_for("Progressing", "False", seconds=seconds)
        self.wait_for("Degraded", "False", seconds=seconds)

    @staticmethod
    def _told(conditions: dict[str, Object]) -> str:
        return "; ".join(
            f"{c['type']}={c['status']} {c['reason']}: {c['message']}" for c in conditions.values()
        )

    # --- requests -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The cluster IP of its router, which this machine reaches through a node."""
        found = self.kubectl.get("service", f"{self.name}-router", "--namespace", self.namespace)
        return f"http://{found['spec']['clusterIP']}:{found['spec']['ports'][0]['port']}"

    def load(self, *, streams: int = 3) -> Load:
        """Return a constant load of streams on it, not yet started."""
        return Load(self.url, MODEL, streams=streams)
