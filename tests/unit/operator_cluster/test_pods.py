"""What pods of Kubernetes tell, as states and faults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from penstock_operator import labels
from penstock_operator.cluster import kinds
from penstock_operator.cluster.children import child_of
from penstock_operator.cluster.observation import observe_workloads
from penstock_operator.cluster.pods import (
    WorkerAnswer,
    address,
    observe_pod,
    state_of,
    waits_for_volumes,
)
from penstock_wire.model_source import FETCHING

if TYPE_CHECKING:
    from penstock_operator.cluster.children import Child
    from penstock_operator.observed import Pod

RUNNING = {"running": {"startedAt": "2030-01-01T00:00:00Z"}}
SCHEDULED = {"type": "PodScheduled", "status": "True"}
READY = {"type": "Ready", "status": "True"}


def container(state: dict[str, Any], *, last: dict[str, Any] | None = None, **more: Any) -> Any:
    return {
        "name": "worker",
        "image": "image:1",
        "ready": False,
        "restartCount": 0,
        "state": state,
        "lastState": {"terminated": last} if last else {},
        **more,
    }


def child(
    *containers: Any,
    conditions: Any = (),
    deleting: bool = False,
    requests: Any = None,
    volumes: Any = (),
    role: str = "decode",
    **status: Any,
) -> Child:
    meta: dict[str, Any] = {
        "name": "chat-x",
        "namespace": "default",
        "uid": "u",
        "labels": {
            labels.SERVICE: "chat",
            labels.ROLE: role,
            labels.REVISION: "r",
            labels.POD_INDEX: "1",
        },
    }
    if deleting:
        meta["deletionTimestamp"] = "2030-01-01T00:00:00Z"
    return child_of(
        kinds.POD,
        {
            "metadata": meta,
            "spec": {
                "nodeName": "node",
                "containers": [{"name": "worker", "resources": {"requests": requests or {}}}],
                "volumes": list(volumes),
            },
            "status": {
                "phase": "Running",
                "podIP": "10.0.0.1",
                "conditions": list(conditions),
                "containerStatuses": list(containers),
                **status,
            },
        },
    )


def observed(pod: Child, answer: WorkerAnswer | None = None, **more: str) -> Pod:
    found = observe_pod(pod, answer, **more)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("pod", "state", "reachable"),
    [
        (child(conditions=[{"type": "PodScheduled", "status": "False"}]), "pending", False),
        (child(container({"waiting": {"reason": "ContainerCreating"}})), "pending", False),
        (child(container(RUNNING)), "starting", True),
        (child(container(RUNNING, ready=True), conditions=[READY]), "ready", True),
        (child(container({"waiting": {}}, last={"exitCode": 1})), "waiting", False),
        (child(container({"terminated": {"exitCode": 1}})), "waiting", False),
        (child(container(RUNNING), conditions=[READY], deleting=True), "draining", False),
        (child(phase="Failed", deleting=True), "stopped", False),
        (child(phase="Succeeded"), "stopped", False),
    ],
)
def test_states(pod: Child, state: str, reachable: bool) -> None:
    assert state_of(pod) == state
    assert bool(address(pod)) == reachable
    assert observed(pod).state == state


@pytest.mark.parametrize(
    "reason",
    ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"],
)
def test_images(reason: str) -> None:
    pod = observed(child(container({"waiting": {"reason": reason, "message": "no such tag"}})))
    assert (pod.fault, pod.message) == ("ImagePullFailed", "image:1: no such tag")


@pytest.mark.parametrize(
    ("last", "fault", "message"),
    [
        ({"exitCode": 3, "message": "a\nboom\n\n"}, "CrashLooping", "exit code 3: boom"),
        ({"exitCode": 1, "reason": "Error"}, "CrashLooping", "exit code 1: Error"),
        ({"exitCode": 0}, "CrashLooping", "exit code 0: its log is empty"),
        (
            {"exitCode": 137, "reason": "OOMKilled", "message": "x"},
            "CrashLooping",
            "exit code 137: out of memory (OOMKilled); raise resources.memory",
        ),
        ({"exitCode": 66, "message": "no model"}, "ModelNotFound", "exit code 66: no model"),
        ({"exitCode": 78, "message": "bad flag"}, "ConfigRefused", "exit code 78: bad flag"),
    ],
)
@pytest.mark.parametrize("state", [RUNNING, {"waiting": {"reason": "CrashLoopBackOff"}}])
def test_ends_are_told_until_the_successor_is_ready(
    state: dict[str, Any], last: dict[str, Any], fault: str, message: str
) -> None:
    pod = observed(child(container(state, last=last, restartCount=2)))
    assert (pod.fault, pod.message, pod.restarts) == (fault, message, 2)
    again = observed(child(container(RUNNING, last=last, ready=True), conditions=[READY]))
    assert (again.fault, again.state) == ("", "ready")


def test_a_router_that_runs_and_does_not_accept_yet_after_a_crash_still_tells_it() -> None:
    pod = observed(child(container(RUNNING, last={"exitCode": 1}), role="router"))
    assert (pod.state, pod.fault) == ("starting", "CrashLooping")


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        ("CreateContainerConfigError", "ConfigRefused"),
        ("CreateContainerError", "CrashLooping"),
        ("RunContainerError", "CrashLooping"),
    ],
)
def test_containers_that_cannot_be_made(reason: str, fault: str) -> None:
    pod = observed(child(container({"waiting": {"reason": reason, "message": "why"}})))
    assert (pod.fault, pod.message) == (fault, f"{reason}: why")


MODEL_CLAIM = {"name": "model", "persistentVolumeClaim": {"claimName": "weights"}}
OTHER_CLAIM = {"name": "scratch", "persistentVolumeClaim": {"claimName": "scratch"}}


@pytest.mark.parametrize(
    ("told", "volumes", "fault"),
    [
        ("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.", (), "InsufficientGPU"),
        (
            "0/2: 1 Insufficient rdma/ib, 1 Insufficient nvidia.com/gpu.",
            (),
            "InsufficientGPU",
        ),
        ("0/2 nodes are available: 2 Insufficient rdma/ib.", (), "RDMAUnavailable"),
        ("0/2 nodes are available: 2 Insufficient cpu.", (), "Unschedulable"),
        ('persistentvolumeclaim "weights" not found', (MODEL_CLAIM,), "ModelNotFound"),
        (
            "pod has unbound immediate PersistentVolumeClaims",
            (MODEL_CLAIM,),
            "ModelNotFound",
        ),
        ('persistentvolumeclaim "scratch" not found', (MODEL_CLAIM, OTHER_CLAIM), "MountFailed"),
        ("pod has unbound immediate PersistentVolumeClaims", (OTHER_CLAIM,), "MountFailed"),
    ],
)
def test_pods_that_no_node_takes(told: str, volumes: Any, fault: str) -> None:
    refused = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    pod = observed(
        child(
            conditions=[{**refused, "message": told}],
            requests={"nvidia.com/gpu": "8", "rdma/ib": "2"},
            volumes=volumes,
            phase="Pending",
        ),
        rdma="rdma/ib",
    )
    assert pod.fault == fault
    assert told in pod.message
    if fault == "RDMAUnavailable":
        assert "no node has 2 of rdma/ib" in pod.message
        assert "spec.decode.resources.rdma" in pod.message


def test_events_of_volumes_count_only_while_no_container_runs() -> None:
    mount = 'MountVolume.SetUp failed for volume "model" : no such directory'
    stuck = child(container({"waiting": {"reason": "ContainerCreating"}}), phase="Pending")
    assert waits_for_volumes(stuck)
    assert observed(stuck, mount=mount).fault == "ModelNotFound"
    assert observed(stuck, mount='for volume "keys"').fault == "MountFailed"
    assert observed(stuck).message == "ContainerCreating"
    runs = child(container(RUNNING))
    assert not waits_for_volumes(runs)
    assert observed(runs, mount=mount).fault == ""


def test_what_only_the_process_knows() -> None:
    loading = WorkerAnswer(progress=0.4, message=f"{FETCHING} 40%")
    pod = observed(child(container(RUNNING)), loading)
    assert (pod.fault, pod.progress) == ("ModelDownloading", 0.4)
    told = WorkerAnswer(transport="tcp", groups_ready=frozenset({"g"}))
    ready = child(container(RUNNING, ready=True), conditions=[READY])
    pod = observed(ready, told)
    assert (pod.transport, pod.groups_ready, pod.fault, pod.progress) == (
        "tcp",
        frozenset({"g"}),
        "",
        1.0,
    )


@pytest.mark.parametrize(
    ("transport", "fault"), [("tcp", "TransportFallback"), ("rc,ud,tcp", ""), ("", "")]
)
def test_tcp_in_place_of_rdma(transport: str, fault: str) -> None:
    ready = child(container(RUNNING, ready=True), conditions=[READY], requests={"rdma/ib": "1"})
    assert observed(ready, WorkerAnswer(transport=transport), rdma="rdma/ib").fault == fault
    assert observed(ready, WorkerAnswer(transport=transport)).fault == ""


def test_a_pod_that_leaves_has_no_fault_and_tells_why_it_goes() -> None:
    taint = {"type": "DisruptionTarget", "status": "True", "message": "deleting due to NoExecute"}
    pod = observed(
        child(container(RUNNING, last={"exitCode": 1}), conditions=[taint], deleting=True)
    )
    assert (pod.fault, pod.message) == ("", "deleting due to NoExecute")


def test_pods_without_a_role_are_not_ours() -> None:
    assert observe_pod(child(role="something"), None) is None


def test_a_pod_that_drains_keeps_its_groups_index_and_is_no_failure() -> None:
    pod = child(container(RUNNING), conditions=[SCHEDULED, READY], deleting=True, role="prefill")
    (workload,) = observe_workloads({("Pod", pod.name): pod})
    assert (workload.replicas, workload.ready, workload.message) == (0, 0, "")
