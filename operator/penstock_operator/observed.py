"""What is wanted and what an executor saw: the input of `planner` and `status`.

The same on Kubernetes and on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock_operator.labels import Role

PodState: TypeAlias = Literal["pending", "starting", "ready", "draining", "waiting", "stopped"]
"""pending: not started. starting: runs, not ready. waiting: ended by itself, started again later.
draining: told to end. stopped: ended."""

Fault: TypeAlias = Literal[
    "",
    "ConfigRefused",
    "CrashLooping",
    "ImagePullFailed",
    "InsufficientGPU",
    "ModelDownloading",
    "ModelNotFound",
    "MountFailed",
    "RDMAUnavailable",
    "TransportFallback",
    "Unschedulable",
]
"""What keeps a pod from working as asked; the reason of the condition that it spoils."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a role should come to."""

    replicas: int
    """0 only for a role that the manifest does not have, or that is asleep."""
    revision: str
    layout: str
    surge: int = 1
    """Replicas beyond `replicas` while a rollout is under way; 0: old goes before new."""
    asleep: bool = False
    """Scaled to zero: the role is there, and a request wakes it."""


Targets: TypeAlias = "Mapping[Role, Target]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One prefill group, or the pods of one revision of decode or router."""

    name: str
    role: Role
    revision: str
    layout: str
    index: int = 0
    """Of a prefill group."""
    replicas: int = 1
    """Asked for: pods, and 1 for a prefill group. 0: a group that drains, its index still taken."""
    ready: int = 0
    """Of these: pods that are ready, or 1 for a group whose every stage is."""
    stages: int = 1
    """Pods of one replica: more than 1 only for a prefill group."""
    message: str = ""
    """Why its pods cannot be made, empty if they can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """One pod."""

    name: str
    role: Role
    workload: str
    revision: str
    group: str = ""
    stage: int = 0
    state: PodState = "pending"
    progress: float = 0.0
    """Of loading weights, 0 to 1."""
    message: str = ""
    """What it says of itself, or why it ended."""
    fault: Fault = ""
    restarts: int = 0
    transport: str = ""
    """What its KV pages travel over, empty while unknown."""
    groups_ready: frozenset[str] | None = None
    """Decode: prefill groups with a verified KV link to this pod. None: it has not said."""

    @property
    def story(self) -> str:
        """What it says while it starts, with how far it is."""
        return self.message if "%" in self.message else f"{self.message} ({self.progress:.0%})"


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    """What the router's own end-to-end readiness check said."""

    ready: bool
    message: str
    holds: bool = False
    """Takes requests and holds them until the workers that it has woken are there."""


def converged(targets: Targets, observed: Sequence[Workload]) -> bool:
    """Return whether exactly the newest revision is there, in number and ready."""
    for role, target in targets.items():
        own = [w for w in observed if w.role == role and w.replicas]
        if any(w.revision != target.revision for w in own):
            return False
        if sum(w.replicas for w in own) != target.replicas:
            return False
        if sum(w.ready for w in own) < target.replicas:
            return False
    return True
