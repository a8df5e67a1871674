"""Why a service is not ready: told within seconds, and gone by itself when the cause is gone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster import containerd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl
    from e2e.service import Service, Services

_SECONDS = 45
"""Until the reason is told: what a kubelet needs for its first attempts, on a busy machine."""
_CLEAR_SECONDS = 420
"""Until it serves: a kubelet's back-off goes up to 5 minutes for images, 2 for volumes."""


@pytest.fixture
def small(service: Service) -> Service:
    """A service with one decode worker."""
    service.spec["decode"]["replicas"] = 1
    return service


@pytest.fixture
def resources(cluster: Cluster) -> Iterator[Resources]:
    """Resources that nodes claim to have, as a device plugin would; none after the test."""
    resources = Resources(cluster)
    yield resources
    resources.clear()


class Resources:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._names: set[str] = set()

    def offer(self, name: str, count: int) -> None:
        self._names.add(name)
        for node in self._cluster.settings.node_names:
            self._patch(node, [{"op": "add", "path": self._path(name), "value": str(count)}])

    def clear(self) -> None:
        for name in self._names:
            for node in self._cluster.settings.node_names:
                self._patch(node, [{"op": "remove", "path": self._path(name)}])

    @staticmethod
    def _path(name: str) -> str:
        return f"/status/capacity/{name.replace('/', '~1')}"

    def _patch(self, node: str, patch: list[dict[str, str]]) -> None:
        arguments = ("patch", "node", node, "--subresource=status", "--type=json")
        self._cluster.kubectl(*arguments, "-p", json.dumps(patch))


def patch_worker(service: Service, role: str, **container: Any) -> None:
    """Patch the container of a role's pods."""
    service.spec[role]["podTemplate"] = {"spec": {"containers": [{"name": "worker", **container}]}}


def test_an_unknown_image(small: Service, cluster: Cluster) -> None:
    small.spec["image"] = {"router": "penstock/router:late", "pullPolicy": "IfNotPresent"}
    small.apply()
    for condition in ("Ready", "RouterReady"):
        small.wait_for(
            condition, "False", reason="ImagePullFailed", says="router:late", seconds=_SECONDS
        )
    for node in cluster.nodes.values():
        containerd.tag(
            node.containerd,
            "docker.io/penstock/router:0.1.0",
            "docker.io/penstock/router:late",
        )
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_too_few_gpus(small: Service, resources: Resources) -> None:
    small.spec["device"] = "cpu"  # there is none behind what the nodes claim to have
    small.spec["device"] = "cpu"  # there is no GPU: a node only says so
    small.spec["decode"]["resources"] = {"gpu": 1}
    small.apply()
    small.wait_for("Ready", "False", reason="InsufficientGPU", seconds=_SECONDS)
    resources.offer("nvidia.com/gpu", 1)
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_a_missing_model(small: Service, services: Services) -> None:
    model = services.place_model(small.namespace)
    aside = model.with_name("aside")
    model.rename(aside)
    small.apply()
    found = small.wait_for("Ready", "False", reason="ModelNotFound", seconds=_SECONDS)
    assert str(model) in found["message"]
    aside.rename(model)
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_a_model_without_weights(small: Service, services: Services) -> None:
    """The directory is there, so the pods start, and say what they miss."""
    weights = services.place_model(small.namespace) / "model.safetensors"
    aside = weights.parents[1] / weights.name
    shutil.move(weights, aside)
    small.apply()
    small.wait_for("Ready", "False", reason="ModelNotFound", says="safetensors", seconds=90)
    shutil.move(aside, weights)
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_a_stage_that_crashes(small: Service, services: Services) -> None:
    """One stage of two: its exit code and the last line of its log are told."""
    repaired = services.place_model(small.namespace) / "repaired"
    program = (
        f'if [ "$POD_INDEX" = 1 ] && [ ! -e {repaired} ]; then echo one; '
        'echo "the disk is on fire" >&2; exit 17; fi; exec penstock-worker "$@"'
    )
    patch_worker(small, "prefill", command=["sh", "-c", program, "worker"])
    small.apply()
    found = small.wait_for("Ready", "False", reason="CrashLooping", seconds=_SECONDS)
    assert f"{small.name}-prefill-0-1" in found["message"]
    assert "17" in found["message"]
    assert "the disk is on fire" in found["message"]
    repaired.touch()
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_a_refused_configuration(small: Service) -> None:
    small.spec["decode"]["extraArgs"] = ["--threads", "none"]
    small.apply()
    small.wait_for("Ready", "False", reason="ConfigRefused", says="--threads", seconds=90)
    small.spec["decode"]["extraArgs"] = ["--threads", "1"]
    small.apply()
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_a_stage_that_cannot_be_placed(small: Service, cluster: Cluster, kubectl: Kubectl) -> None:
    """Each stage wants a node of its own, and one node is closed."""
    own_group = {"matchLabels": {"penstock.dev/group": f"{small.name}-prefill-0"}}
    term = {"labelSelector": own_group, "topologyKey": "kubernetes.io/hostname"}
    affinity = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    small.spec["prefill"]["podTemplate"] = {"spec": {"affinity": affinity}}
    closed = cluster.settings.node_names[1:]
    for node in closed:
        kubectl("cordon", node)
    try:
        small.apply()
        small.wait_for("PrefillReady", "False", reason="GangIncomplete", seconds=120)
        message = small.conditions()["PrefillReady"]["message"]
        assert "stage" in message
        assert "node" in message
    finally:
        for node in closed:
            kubectl("uncordon", node)
    small.wait_for("Ready", seconds=_CLEAR_SECONDS)


def test_rdma_that_is_not_there(small: Service, resources: Resources) -> None:
    """No node has the device; then nodes claim to have it, and there is none behind the claim."""
    for role in ("prefill", "decode"):
        small.spec[role]["resources"] = {"rdma": {"resource": "rdma/ib"}}
    small.apply()
    found = small.wait_for("Ready", "False", reason="RDMAUnavailable", seconds=_SECONDS)
    assert "rdma/ib" in found["message"]
    resources.offer("rdma/ib", 4)
    small.wait_for("Degraded", "True", reason="TransportFallback", seconds=_CLEAR_SECONDS)
    small.wait_for("Ready")
    for role in ("prefill", "decode"):
        del small.spec[role]["resources"]
    small.apply()
    small.wait_until_settled(seconds=_CLEAR_SECONDS)
