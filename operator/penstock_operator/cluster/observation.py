"""The objects of a service as workloads and pods, and what its roles should come to. Pure.

Readiness is counted from pods, not from the counters of their controllers: so a pod and its
workload never disagree. What has pods that still drain, but no object any more, is a workload of no
replicas, so that a prefill group's index is not given away before its pods are gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from penstock_operator import labels, manifests, podspec
from penstock_operator.cluster.kinds import DEPLOYMENT, POD, SCALER, STATEFUL_SET
from penstock_operator.cluster.pods import observe_pod, role_of, state_of, workload_name
from penstock_operator.observed import Target, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from penstock_operator.api import InferenceService
    from penstock_operator.cluster.children import Child, ChildId
    from penstock_operator.cluster.pods import WorkerAnswer
    from penstock_operator.labels import Role
    from penstock_operator.observed import Pod, Targets


def pods_of(children: Mapping[ChildId, Child]) -> list[Child]:
    """Return the pods in the order of their names."""
    return [child for (kind, _), child in sorted(children.items()) if kind == POD.name]


def workload_children(children: Mapping[ChildId, Child]) -> list[Child]:
    """Return the StatefulSets and Deployments that are not being deleted."""
    kinds = (STATEFUL_SET.name, DEPLOYMENT.name)
    found = [child for (kind, _), child in sorted(children.items()) if kind in kinds]
    return [child for child in found if not child.deleting and role_of(child) is not None]


def observe_workloads(children: Mapping[ChildId, Child]) -> list[Workload]:
    """Return what the planner plans from."""
    pods = pods_of(children)
    found = [_workload(child, pods) for child in workload_children(children)]
    names = {workload.name for workload in found}
    for pod in pods:
        name = workload_name(pod)
        if name in names or role_of(pod) != "prefill" or not _holds_index(pod):
            continue
        names.add(name)
        found.append(replace(_workload(pod, []), name=name, replicas=0, ready=0))
    return found


def observe_pods(
    children: Mapping[ChildId, Child],
    *,
    service: InferenceService | None,
    answers: Mapping[str, WorkerAnswer],
    mounts: Mapping[str, str],
) -> list[Pod]:
    """Return the pods that have not ended.

    Args:
        children: the service's objects.
        service: its manifest, None if that is refused.
        answers: of workers, by the pod's uid.
        mounts: events about volumes, by the pod's uid.
    """
    found = []
    for child in pods_of(children):
        pod = observe_pod(
            child,
            answers.get(child.uid),
            mount=mounts.get(child.uid, ""),
            rdma=_rdma_of(service, role_of(child)),
        )
        if pod is not None and pod.state != "stopped":
            found.append(pod)
    return found


def targets_of(service: InferenceService, children: Mapping[ChildId, Child]) -> dict[Role, Target]:
    """Return what each role should come to: the manifest's number, or its scaler's."""
    return {role: _target(service, role, children) for role in labels.ROLES}


def targets_of_what_runs(workloads: Iterable[Workload]) -> Targets:
    """Return targets that leave everything as it is, for a manifest that is refused."""
    workloads = list(workloads)
    targets: dict[Role, Target] = {}
    for role in labels.ROLES:
        own = [w for w in workloads if w.role == role and w.replicas]
        newest = max(own, key=lambda w: (w.ready, w.name), default=None)
        targets[role] = Target(
            replicas=sum(w.replicas for w in own),
            revision=newest.revision if newest else "",
            layout=newest.layout if newest else "",
        )
    return targets


# --- parts ------------------------------------------------------------------------------------


def _workload(child: Child, pods: list[Child]) -> Workload:
    """Return the workload of an object, or of the labels of one of its pods."""
    role = role_of(child)
    assert role is not None, "callers choose objects of a role"
    own = [pod for pod in pods if workload_name(pod) == child.name]
    asked = int(child.spec.get("replicas") or 0)
    ready = sum(state_of(pod) == "ready" for pod in own)
    group = role == "prefill"
    return Workload(
        name=child.name,
        role=role,
        revision=child.labels.get(labels.REVISION, ""),
        layout=child.labels.get(labels.LAYOUT, ""),
        index=group_index(child.labels.get(labels.GROUP, "")),
        replicas=1 if group else asked,
        ready=int(0 < asked <= ready) if group else min(ready, asked),
        stages=max(1, asked) if group else 1,
        message=_failure(child),
    )


def group_index(group: str) -> int:
    """Return the number behind the last dash of a group's name."""
    number = group.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _holds_index(pod: Child) -> bool:
    """Whether the pod of a vanished StatefulSet is on its way out.

    One without a controller was left behind on purpose; a new StatefulSet of the name adopts it.
    """
    return pod.deleting or bool(pod.owner)


def _failure(child: Child) -> str:
    """Return why a controller cannot make pods. A pod stands for its vanished StatefulSet, too."""
    conditions = child.status.get("conditions") or []
    for condition in conditions:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message") or condition.get("reason") or "")
    return ""


def _rdma_of(service: InferenceService | None, role: Role | None) -> str:
    part = service.spec.role(role) if service is not None and role is not None else None
    return part.resources.rdma.resource if part is not None and part.resources.rdma else ""


def _target(service: InferenceService, role: Role, children: Mapping[ChildId, Child]) -> Target:
    part = service.spec.role(role)
    layout = manifests.layout(service)
    if part is None:
        return Target(replicas=0, revision="", layout=layout)
    replicas = part.wanted
    scaler = children.get((SCALER.name, podspec.scaler_name(service, role)))
    if part.replicas is None and scaler is not None and not scaler.deleting:
        fewest, most = part.bounds
        asked = scaler.spec.get("replicas")
        replicas = min(most, max(fewest, asked if isinstance(asked, int) else 1))
    return Target(
        replicas=replicas,
        revision=manifests.revision(service, role),
        layout=layout,
        asleep=replicas == 0,
    )
