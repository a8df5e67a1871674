"""A pod of Kubernetes as the planner and the status see it. Pure.

A pod tells where it is in its life and why it cannot go on: not scheduled, no image, no volume,
ended with a code. What only its process knows (how far the weights are loaded, which links work)
comes from its own answers, and what only the kubelet knows of a volume from the pod's events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from penstock_operator import labels, model_volume
from penstock_operator.observed import Pod
from penstock_wire.model_source import FETCHING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock_operator.cluster.children import Child
    from penstock_operator.cluster.kinds import Object
    from penstock_operator.labels import Role
    from penstock_operator.observed import Fault, PodState

EXIT_MODEL_NOT_FOUND = 66
EXIT_CONFIG_REFUSED = 78
GPU = "nvidia.com/gpu"
_IMAGE_REASONS = frozenset(
    {
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_START_REASONS = frozenset({"CreateContainerError", "PostStartHookError", "RunContainerError"})


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerAnswer:
    """What a worker said of itself over HTTP."""

    progress: float = 0.0
    message: str = ""
    transport: str = ""
    groups_ready: frozenset[str] | None = None
    load: int = 0
    """Work that would be lost with it: requests, or pages in use."""


class Trouble(NamedTuple):
    """A fault and what to tell of it."""

    fault: Fault
    message: str


def observe_pod(
    child: Child, answer: WorkerAnswer | None, *, mount: str = "", rdma: str = ""
) -> Pod | None:
    """Return the pod, None for one without the labels of a role.

    Args:
        child: the pod.
        answer: of its process, None if it has not answered.
        mount: the newest event about a volume or the network that could not be set up.
        rdma: the resource that the manifest asks for as RDMA devices, empty if it does not.
    """
    role = role_of(child)
    if role is None:
        return None
    state = state_of(child)
    trouble = _trouble(child, state, answer, mount, rdma)
    told = answer or WorkerAnswer()
    message = trouble.message or told.message
    return Pod(
        name=child.name,
        role=role,
        workload=workload_name(child),
        revision=child.labels.get(labels.REVISION, ""),
        group=child.labels.get(labels.GROUP, ""),
        stage=_number(child.labels.get(labels.POD_INDEX)),
        state=state,
        progress=1.0 if state == "ready" else told.progress,
        message=message or _plain_reason(child),
        fault=trouble.fault,
        restarts=sum(_number(status.get("restartCount")) for status in _containers(child)),
        transport=told.transport if state == "ready" else "",
        groups_ready=told.groups_ready if state == "ready" else None,
    )


def role_of(child: Child) -> Role | None:
    """Return the role that the pod's label names."""
    return next((role for role in labels.ROLES if child.labels.get(labels.ROLE) == role), None)


def workload_name(child: Child) -> str:
    """Return the name of the StatefulSet or Deployment that the pod belongs to."""
    group = child.labels.get(labels.GROUP)
    parts = (child.labels.get(name, "") for name in (labels.SERVICE, labels.ROLE, labels.REVISION))
    return group or "-".join(parts)


def state_of(child: Child) -> PodState:
    """Return where the pod is in its life."""
    if child.status.get("phase") in ("Succeeded", "Failed"):
        return "stopped"
    if child.deleting:
        return "draining"
    if _condition(child, "Ready").get("status") == "True":
        return "ready"
    states = [status["state"] for status in _containers(child)]
    if any("running" in state for state in states):
        return "starting"
    ended = any(_last_end(status) for status in _containers(child))
    return "waiting" if ended else "pending"


def address(child: Child) -> str:
    """Return the address of a pod whose process can be asked, else nothing."""
    if state_of(child) not in ("starting", "ready"):
        return ""
    found = child.status.get("podIP")
    return found if isinstance(found, str) else ""


def waits_for_volumes(child: Child) -> bool:
    """Whether the pod has a node but no container: only its events tell what it waits for."""
    if state_of(child) != "pending" or not child.spec.get("nodeName"):
        return False
    waiting = [_map(status["state"].get("waiting")).get("reason") for status in _containers(child)]
    return all(reason in (None, "", "ContainerCreating", "PodInitializing") for reason in waiting)


# --- faults -----------------------------------------------------------------------------------


def _trouble(
    child: Child, state: PodState, answer: WorkerAnswer | None, mount: str, rdma: str
) -> Trouble:
    if state in ("draining", "stopped"):
        return Trouble("", _leaving(child))
    if state == "ready":
        return _fallback(child, answer, rdma)
    for found in (_image(child), _start(child), _ended(child), _unplaced(child, rdma)):
        if found is not None:
            return found
    if mount and waits_for_volumes(child):
        about_model = f'volume "{model_volume.VOLUME}"' in mount
        return Trouble("ModelNotFound" if about_model else "MountFailed", mount)
    if state == "starting" and answer is not None and answer.message.startswith(FETCHING):
        return Trouble("ModelDownloading", answer.message)
    return Trouble("", "")


def _image(child: Child) -> Trouble | None:
    for status, waiting in _waiting(child):
        if waiting.get("reason") in _IMAGE_REASONS:
            why = waiting.get("message") or waiting["reason"]
            return Trouble("ImagePullFailed", f"{status.get('image')}: {why}")
    return None


def _start(child: Child) -> Trouble | None:
    """A container that the kubelet cannot make or run."""
    for _, waiting in _waiting(child):
        reason = waiting.get("reason")
        told = f"{reason}: {waiting.get('message', '')}".rstrip(": ")
        if reason == "CreateContainerConfigError":
            return Trouble("ConfigRefused", told)
        if reason in _START_REASONS:
            return Trouble("CrashLooping", told)
    return None


def _ended(child: Child) -> Trouble | None:
    """A process that ended by itself, told until its successor is ready."""
    for status in _containers(child):
        ended = _last_end(status)
        if ended is None:
            continue
        code = _number(ended.get("exitCode"))
        lines = [line.strip() for line in str(ended.get("message") or "").splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        if ended.get("reason") == "OOMKilled":
            told = f"exit code {code}: out of memory (OOMKilled); raise resources.memory"
            return Trouble("CrashLooping", told)
        told = f"exit code {code}: {last or ended.get('reason') or 'its log is empty'}"
        if code == EXIT_MODEL_NOT_FOUND:
            return Trouble("ModelNotFound", told)
        if code == EXIT_CONFIG_REFUSED:
            return Trouble("ConfigRefused", told)
        return Trouble("CrashLooping", told)
    return None


def _unplaced(child: Child, rdma: str) -> Trouble | None:
    """A pod that no node takes, in the scheduler's words."""
    scheduled = _condition(child, "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    told = str(scheduled.get("message") or scheduled.get("reason") or "no node takes it")
    requests = _requests(child)
    if f"Insufficient {GPU}" in told:
        return Trouble("InsufficientGPU", f"it asks for {requests.get(GPU, 0)} GPUs: {told}")
    if rdma and f"Insufficient {rdma}" in told:
        return Trouble("RDMAUnavailable", _rdma_advice(child, rdma, told))
    if "persistentvolumeclaim" in told.lower():
        model = [v for v in child.spec.get("volumes", []) if v.get("name") == model_volume.VOLUME]
        claims = [_map(v.get("persistentVolumeClaim")).get("claimName") for v in model]
        named = any(f'"{claim}"' in told for claim in claims)
        unbound = bool(model) and "unbound" in told
        return Trouble("ModelNotFound" if named or unbound else "MountFailed", told)
    return Trouble("Unschedulable", told)


def _rdma_advice(child: Child, rdma: str, told: str) -> str:
    role = child.labels.get(labels.ROLE)
    count = _requests(child).get(rdma, 0)
    return (
        f"no node has {count} of {rdma} to give; install the device plugin that advertises it, or "
        f"change or remove spec.{role}.resources.rdma: {told}"
    )


def _fallback(child: Child, answer: WorkerAnswer | None, rdma: str) -> Trouble:
    """A pod that was given RDMA devices and does not use them."""
    told = answer.transport if answer is not None else ""
    if rdma and rdma in _requests(child) and set(told.split(",")) == {"tcp"}:
        role = child.labels.get(labels.ROLE)
        return Trouble(
            "TransportFallback",
            f"KV travels over TCP although spec.{role}.resources.rdma asks for {rdma}; see what "
            "UCX says of the devices in the pod's log",
        )
    return Trouble("", "")


def _leaving(child: Child) -> str:
    target = _condition(child, "DisruptionTarget")
    if target.get("status") == "True":
        return str(target.get("message") or target.get("reason") or "")
    return str(child.status.get("message") or "")


def _plain_reason(child: Child) -> str:
    reasons = [waiting.get("reason") for _, waiting in _waiting(child)]
    return next((str(reason) for reason in reasons if reason), "")


# --- parts ------------------------------------------------------------------------------------


def _last_end(status: Object) -> Object | None:
    """Return how the container's process ended last, None if the one that runs is the first.

    A process that is ready again has made up for the end of its predecessor.
    """
    if status.get("ready"):
        return None
    for state in (status["state"], status["lastState"]):
        if "terminated" in state:
            return _map(state["terminated"])
    return None


def _waiting(child: Child) -> Iterator[tuple[Object, Object]]:
    for status in _containers(child):
        yield status, _map(status["state"].get("waiting"))


def _containers(child: Child) -> list[Object]:
    status = child.status
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _condition(child: Child, kind: str) -> Object:
    conditions: list[Object] = child.status.get("conditions", [])
    return next((c for c in conditions if c.get("type") == kind), {})


def _requests(child: Child) -> Object:
    found: Object = {}
    for container in child.spec.get("containers", []):
        found.update(_map(_map(container.get("resources")).get("requests")))
    return found


def _map(value: object) -> Object:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isdigit() else 0
