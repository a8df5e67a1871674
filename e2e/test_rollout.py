"""Changes of a running service under a constant load: no stream fails, none is garbled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.cluster import Cluster
    from e2e.load import Load
    from e2e.release import Release
    from e2e.service import Service, Services

_ROLLOUT_SECONDS = 480
"""A rollout replaces four workers one after another, each importing torch on a busy machine."""
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def running(services: Services) -> Service:
    """A service of which every role has two replicas or stages, in its last test's state."""
    service = services.create("rollout")
    service.spec["router"] = {"replicas": 2}
    service.apply()
    service.wait_until_settled()
    return service


@pytest.fixture
def load(running: Service) -> Iterator[Load]:
    """Streams from before the test's first change to after its last."""
    running.wait_until_settled(seconds=_ROLLOUT_SECONDS)
    with running.load() as load:
        yield load
        load.goes_on()
    load.check()


def settle(service: Service, crashing: Release | None = None) -> None:
    """Apply and wait; with `crashing`, the operator is killed once it has begun to act on it."""
    service.apply()
    if crashing is not None:
        until("the operator has begun", lambda: seen(service), seconds=60)
        crashing.kill()
    service.wait_until_settled(seconds=_ROLLOUT_SECONDS)


def seen(service: Service) -> bool:
    """Whether the operator has taken up the newest spec."""
    found = service.read()
    conditions = found["status"]["conditions"]
    return all(c["observedGeneration"] == found["metadata"]["generation"] for c in conditions)


def set_chunks(service: Service, tokens: int) -> None:
    """Change an argument of all workers, which makes new revisions of prefill and decode."""
    for role in ("prefill", "decode"):
        service.spec[role]["chunkedPrefill"] = {"maxTokens": tokens}


def revisions(service: Service) -> dict[str, str]:
    status = service.read()["status"]
    return {role: status[role]["revision"] for role in ("prefill", "decode", "router")}


def arguments(service: Service, role: str) -> list[str]:
    [first, *_] = service.pods(role)
    found: list[str] = first["spec"]["containers"][0]["args"]
    return found


def test_a_new_revision_and_its_rollback(
    running: Service, load: Load, operator_installed: Release
) -> None:
    before = revisions(running)
    set_chunks(running, 256)
    settle(running)
    changed = revisions(running)
    assert changed["prefill"] != before["prefill"]
    assert changed["decode"] != before["decode"]
    assert changed["router"] == before["router"]
    assert "256" in arguments(running, "decode")
    load.check()

    for role in ("prefill", "decode"):
        del running.spec[role]["chunkedPrefill"]
    settle(running, crashing=operator_installed)
    assert revisions(running) == before


def test_a_second_change_in_mid_rollout(
    running: Service, load: Load, operator_installed: Release
) -> None:
    set_chunks(running, 512)
    running.apply()
    running.wait_for("Progressing", "True", reason="RevisionMixed")
    set_chunks(running, 1024)
    settle(running, crashing=operator_installed)
    for role in ("prefill", "decode"):
        assert "1024" in arguments(running, role)
        assert (
            len({pod["metadata"]["labels"]["penstock.dev/revision"] for pod in running.pods(role)})
            == 1
        )
    load.check()


@pytest.mark.parametrize("crash", [False, True], ids=["", "while-the-operator-crashes"])
def test_each_role_is_scaled_up_and_down(
    running: Service, load: Load, operator_installed: Release, crash: bool
) -> None:
    crashing = operator_installed if crash else None
    for role, up, down in (("decode", 3, 1), ("router", 3, 1), ("prefill", 2, 1)):
        running.spec[role]["replicas"] = up
        settle(running, crashing)
        assert running.read()["status"][role]["ready"] == up
        running.spec[role]["replicas"] = down
        settle(running, crashing)
        assert running.read()["status"][role]["ready"] == down
        load.check()
    running.spec["decode"]["replicas"] = running.spec["router"]["replicas"] = 2
    settle(running)


def test_routers_are_replaced_one_by_one(running: Service, load: Load) -> None:
    for pod in running.pods("router"):
        running.run("delete", "pod", pod["metadata"]["name"])  # waits until it is gone
        running.wait_until_settled()
        load.goes_on()


def test_workers_are_replaced_one_by_one(running: Service, load: Load) -> None:
    for role in ("decode", "prefill"):
        for pod in running.pods(role):
            running.run("delete", "pod", pod["metadata"]["name"])
            running.wait_until_settled()
            load.goes_on()


def test_the_operator_is_killed_in_the_middle_of_a_rollout(
    running: Service, load: Load, operator_installed: Release
) -> None:
    set_chunks(running, 256)
    running.apply()
    running.wait_for("Progressing", "True", reason="RevisionMixed")
    operator_installed.kill()
    running.wait_until_settled(seconds=_ROLLOUT_SECONDS)
    assert "256" in arguments(running, "decode")
    load.check()


def test_a_restart_of_the_operator_changes_nothing(
    running: Service, load: Load, operator_installed: Release
) -> None:
    before = {pod["metadata"]["uid"] for pod in running.pods()}
    version = running.read()["metadata"]["resourceVersion"]
    operator_installed.restart()
    load.goes_on()
    assert {pod["metadata"]["uid"] for pod in running.pods()} == before
    assert running.read()["metadata"]["resourceVersion"] == version


def test_a_node_is_drained(
    running: Service, load: Load, cluster: Cluster, operator_installed: Release
) -> None:
    """With the operator crashing in the middle of it."""
    node = cluster.settings.node_names[-1]
    drain = ("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
    try:
        cluster.kubectl("cordon", node)
        operator_installed.kill()
        cluster.kubectl(*drain, seconds=360)
        running.wait_for("Ready", seconds=_ROLLOUT_SECONDS)
        assert not [p for p in running.pods() if p["spec"]["nodeName"] == node]
        load.goes_on()
    finally:
        cluster.kubectl("uncordon", node)


def test_an_autoscaler_drives_a_role(services: Services) -> None:
    """Both by `kubectl scale` and by an HPA; the operator fights neither."""
    service = services.create("autoscaled")
    service.spec["decode"] = {
        **{key: value for key, value in service.spec["decode"].items() if key != "replicas"},
        "autoscaling": {"minReplicas": 1, "maxReplicas": 3},
    }
    service.apply()
    service.wait_until_settled()
    with service.load(streams=2) as load:
        service.run("scale", "rolescaler", "demo-decode", "--replicas=2")
        until("two decode workers run", lambda: decode_ready(service) == 2, seconds=180)
        # An HPA raises a target below its minimum without any metrics.
        scaler = {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "RoleScaler",
            "name": "demo-decode",
        }
        hpa = {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "decode", "namespace": service.namespace},
            "spec": {"scaleTargetRef": scaler, "minReplicas": 3, "maxReplicas": 3},
        }
        service.kubectl("apply", "-f", "-", stdin=json.dumps(hpa))
        until("three decode workers run", lambda: decode_ready(service) == 3, seconds=180)
        service.run("delete", "hpa", "decode")
        service.run("scale", "rolescaler", "demo-decode", "--replicas=1")
        until("one decode worker runs", lambda: decode_ready(service) == 1, seconds=180)
        load.goes_on()
    load.check()


def decode_ready(service: Service) -> int:
    status = service.read()["status"]["decode"]
    return int(status["ready"]) if status["ready"] == status["replicas"] else -1
