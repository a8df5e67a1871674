"""What was observed, as conditions a person can trust. Pure.

Ready is True only if ConfigValid, ModelReady, PrefillReady, DecodeReady, RouterReady and
KVTransferReady are all True; Unknown is not True. A role is ready when it can serve: one group,
one worker. Fewer than wanted is told by Progressing (on the way) and Degraded (a fault), so that
Ready answers one question: would a request through the router succeed? A role that is scaled to
zero is ready, because a request wakes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from penstock_operator.api import Condition, ConditionStatus, RoleStatus, Status
from penstock_operator.observed import converged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from penstock_operator.errors import Problem
    from penstock_operator.labels import Role
    from penstock_operator.observed import Fault, Pod, RouterAnswer, Targets, Workload

NEEDED = (
    "ConfigValid",
    "ModelReady",
    "PrefillReady",
    "DecodeReady",
    "RouterReady",
    "KVTransferReady",
)
"""Ready is the conjunction of these."""

_FAULTS: tuple[Fault, ...] = (
    "InsufficientGPU",
    "RDMAUnavailable",
    "Unschedulable",
    "ImagePullFailed",
    "ModelNotFound",
    "ConfigRefused",
    "MountFailed",
    "CrashLooping",
    "TransportFallback",
    "ModelDownloading",
)
"""Most telling first: the cause of others comes before what it causes."""
_UNPLACED: tuple[Fault, ...] = ("InsufficientGPU", "RDMAUnavailable", "Unschedulable")
"""No node takes the pod."""
_LONGEST = 2000
"""Characters of a message: many stages may each have a long story, and the API has a limit."""
_PASSING: tuple[Fault, ...] = ("ModelDownloading",)
"""Not a fault once it is over, and it ends by itself."""

_Verdict: TypeAlias = tuple[ConditionStatus, str, str]
"""Status, reason, message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """All that conditions are computed from."""

    targets: Targets
    workloads: Sequence[Workload] = ()
    pods: Sequence[Pod] = ()
    router: RouterAnswer | None = None
    """None: the router has not been asked, or did not answer."""
    model: str = ""
    """What clients send as `model`."""
    url: str = ""
    problems: Sequence[Problem] = ()
    """Why the spec cannot be carried out."""
    failure: str = ""
    """Why the last step could not be carried out, empty if it was."""

    def of(self, role: Role) -> list[Pod]:
        """Return the pods of `role`."""
        return [pod for pod in self.pods if pod.role == role]

    def ready(self, role: Role) -> int:
        """Return how many of `role` are ready: groups for prefill."""
        return sum(w.ready for w in self.workloads if w.role == role)

    @property
    def sleeping(self) -> list[Role]:
        """The roles that are scaled to zero."""
        return [role for role, target in self.targets.items() if target.asleep]


def compute_status(
    seen: Observation, *, generation: int, previous: Status | None, now: datetime
) -> Status:
    """Return the whole status. `previous` gives the transition times of what did not flip."""
    verdicts: dict[str, _Verdict] = {
        "ConfigValid": _config_valid(seen),
        "ModelReady": _model_ready(seen),
        "PrefillReady": _role_ready(seen, "prefill"),
        "DecodeReady": _role_ready(seen, "decode"),
        "RouterReady": _router_ready(seen),
        "KVTransferReady": _kv_transfer_ready(seen),
    }
    verdicts = {
        "Ready": _ready(verdicts),
        **verdicts,
        "Progressing": _progressing(seen),
        "Degraded": _degraded(seen),
    }
    times = (
        {c.type: (c.status, c.last_transition_time) for c in previous.conditions}
        if previous
        else {}
    )
    conditions = []
    for kind, (status, reason, message) in verdicts.items():
        before, since = times.get(kind, (None, now))
        conditions.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …",
                observedGeneration=generation,
                lastTransitionTime=since if before == status else now,
            )
        )
    target = seen.targets["prefill"]
    prefill = target.replicas or target.asleep or seen.ready("prefill")
    return Status(
        observedGeneration=generation,
        conditions=tuple(conditions),
        prefill=_role_status(seen, "prefill") if prefill else None,
        decode=_role_status(seen, "decode"),
        router=_role_status(seen, "router"),
        model=seen.model,
        url=seen.url,
        transport=",".join(sorted({pod.transport for pod in seen.pods} - {""})),
    )


def transitions(previous: Status | None, current: Status) -> list[Condition]:
    """Return the conditions that flipped: what is worth an event."""
    before = {c.type: c.status for c in previous.conditions} if previous else {}
    return [c for c in current.conditions if before.get(c.type) != c.status]


# --- conditions -------------------------------------------------------------------------------


def _ready(verdicts: dict[str, _Verdict]) -> _Verdict:
    """All or not: told by the condition that explains most, a fault before its consequences."""
    missing = [(kind, *verdicts[kind]) for kind in NEEDED if verdicts[kind][0] != "True"]
    if not missing:
        return "True", "AllReady", "requests through the router succeed"
    faults = [found for found in missing if found[2] in _FAULTS]
    false = [found for found in missing if found[1] == "False"]
    kind, status, reason, message = (faults or false or missing)[0]
    return ("False" if false else status), reason, f"{kind}: {message}"


def _config_valid(seen: Observation) -> _Verdict:
    if seen.problems:
        return "False", "Invalid", "; ".join(map(str, seen.problems))
    return "True", "Valid", "the spec can be carried out"


def _role_ready(seen: Observation, role: Role) -> _Verdict:
    target, ready = seen.targets[role], seen.ready(role)
    if target.asleep:
        return "True", "ScaledToZero", f"no {role} runs; a request starts it"
    if role == "prefill" and target.replicas == 0:
        return "True", "Aggregated", "decode workers prefill for themselves"
    if ready:
        noun = "group" if role == "prefill" else "pod"
        return "True", "Available", f"{ready}/{target.replicas} {noun}s ready"
    return _role_missing(seen, role)


def _role_missing(seen: Observation, role: Role) -> _Verdict:
    """Say why no replica of a role is ready."""
    pods = seen.of(role)
    fault = _worst_fault(pods)
    gap = _gang_gap(seen) if role == "prefill" else ""
    if gap and (fault is None or fault.fault == "Unschedulable"):
        return "False", "GangIncomplete", gap
    if fault is not None:
        told = gap if gap and fault.fault in _UNPLACED else f"{fault.name}: {fault.message}"
        return "False", fault.fault, told
    if not pods:
        return _nothing_yet(seen, role)
    slowest = min(pods, key=lambda pod: (pod.progress, pod.name))
    return "False", "Starting", f"{slowest.name}: {slowest.message or slowest.state}"


def _nothing_yet(seen: Observation, role: Role) -> _Verdict:
    """No pod of the role exists: the API's or a controller's word is all there is to tell."""
    refused = [w for w in seen.workloads if w.role == role and w.message]
    if refused:
        return "False", "PodsRefused", f"{refused[0].name}: {refused[0].message}"
    if seen.failure:
        return "False", "StepFailed", seen.failure
    return "False", "NotStarted", f"no {role} pod exists yet"


def _gang_gap(seen: Observation) -> str:
    """Say which stages are missing, and why, from groups of which others are there.

    Beside a ready stage everything that is not ready is missing. Beside stages that only start,
    what will not start by itself is missing.
    """
    sizes = {w.name: w.stages for w in seen.workloads if w.role == "prefill"}
    pods = seen.of("prefill")
    gaps = []
    for group in sorted({pod.group for pod in pods if pod.state != "draining"}):
        stages = {pod.stage: pod for pod in pods if pod.group == group}
        count = max(sizes.get(group, 1), max(stages) + 1)
        ready = any(pod.state == "ready" for pod in stages.values())
        absent = [stage for stage in range(count) if _absent(stages.get(stage), beside_ready=ready)]
        if absent and len(absent) < count:
            told = ", ".join(f"{stage} ({_why_absent(stages.get(stage))})" for stage in absent)
            gaps.append(f"{group} waits for stage {told}")
    return "; ".join(gaps)


def _absent(pod: Pod | None, *, beside_ready: bool) -> bool:
    if pod is None or pod.state in ("draining", "waiting", "stopped"):
        return True
    if beside_ready:
        return pod.state != "ready"
    return bool(pod.fault) and pod.fault not in _PASSING


def _why_absent(pod: Pod | None) -> str:
    if pod is None:
        return "it has no pod"
    if pod.fault:
        return f"{pod.fault}: {pod.message}"
    return pod.message or pod.state


def _model_ready(seen: Observation) -> _Verdict:
    """The weights are loaded by one decode worker and, if asked for, by one whole group."""
    pods = [*seen.of("prefill"), *seen.of("decode")]
    decode = seen.targets["decode"].asleep or any(map(_loaded, seen.of("decode")))
    groups = {pod.group for pod in seen.of("prefill")}
    prefill = seen.targets["prefill"].replicas == 0 or any(
        all(_loaded(pod) for pod in pods if pod.group == group) for group in groups
    )
    if decode and prefill:
        if "decode" in seen.sleeping:
            return "True", "ScaledToZero", "a request loads the weights"
        return "True", "Loaded", "the weights are in memory"
    loading = [pod for pod in pods if not _loaded(pod) and pod.state == "starting"]
    slowest = min(loading, key=lambda pod: (pod.progress, pod.name), default=None)
    downloading = [pod for pod in loading if pod.fault == "ModelDownloading"]
    if downloading:
        pod = downloading[0]
        return "False", "ModelDownloading", f"{pod.name}: {pod.story}"
    if slowest is not None and slowest.message:
        return "False", "ModelLoading", f"{slowest.name}: {slowest.story}"
    return "Unknown", "NotReported", "no worker has told of the model yet"


def _loaded(pod: Pod) -> bool:
    return pod.state in ("ready", "draining") or (pod.state == "starting" and pod.progress >= 1)


def _router_ready(seen: Observation) -> _Verdict:
    """The router's own end-to-end check decides, not its pod's readiness."""
    if seen.router is not None and seen.router.ready:
        return "True", "Available", seen.router.message
    if seen.sleeping and seen.router is not None and seen.router.holds:
        return "True", "ScaledToZero", "the router holds requests until the workers are there"
    fault = _worst_fault(seen.of("router"))
    if fault is not None:
        return "False", fault.fault, f"{fault.name}: {fault.message}"
    if seen.router is not None:
        return "False", "NotReady", seen.router.message
    return "Unknown", "NotAnswering", "the router has not answered yet"


def _kv_transfer_ready(seen: Observation) -> _Verdict:
    """Links are what decode workers report; a router that is ready has proven one end to end."""
    if seen.sleeping:
        return "True", "ScaledToZero", "no KV is transferred until a request starts the workers"
    if seen.targets["prefill"].replicas == 0:
        return "True", "Aggregated", "no KV is transferred"
    groups = {w.name for w in seen.workloads if w.role == "prefill" and w.ready}
    told = [pod for pod in seen.of("decode") if pod.groups_ready is not None]
    links = sum(len(groups & (pod.groups_ready or frozenset())) for pod in told)
    if links:
        return "True", "LinksVerified", f"{links} of {len(groups) * len(told)} links verified"
    if seen.router is not None and seen.router.ready:
        return "True", "EndToEnd", "the router's end-to-end check passed"
    if told and groups:
        return "False", "NoLink", "no decode worker has a verified KV link to a ready group"
    return "Unknown", "NotReported", "no decode worker has told of its KV links yet"


def _progressing(seen: Observation) -> _Verdict:
    if converged(seen.targets, seen.workloads):
        return "False", "Complete", "everything is as the spec says"
    counts = []
    mixed = False
    for role, target in seen.targets.items():
        own = [w for w in seen.workloads if w.role == role]
        mixed = mixed or len({w.revision for w in own}) > 1
        if target.replicas or own:
            updated = sum(w.ready for w in own if w.revision == target.revision)
            counts.append(f"{role} {updated}/{target.replicas}")
    if mixed:
        return "True", "RevisionMixed", f"ready of the newest revision: {', '.join(counts)}"
    return "True", "Starting", f"ready: {', '.join(counts)}"


def _degraded(seen: Observation) -> _Verdict:
    fault = _worst_fault([pod for pod in seen.pods if pod.fault not in _PASSING])
    if fault is not None:
        return "True", fault.fault, f"{fault.name}: {fault.message}"
    if seen.failure:
        return "True", "StepFailed", seen.failure
    refused = [w for w in seen.workloads if w.message]
    if refused:
        return "True", "PodsRefused", f"{refused[0].name}: {refused[0].message}"
    return "False", "AsExpected", "no pod reports a fault"


# --- parts ------------------------------------------------------------------------------------


def _worst_fault(pods: Sequence[Pod]) -> Pod | None:
    faulty = [pod for pod in pods if pod.fault]
    return min(faulty, key=lambda pod: (_FAULTS.index(pod.fault), pod.name), default=None)


def _role_status(seen: Observation, role: Role) -> RoleStatus:
    target = seen.targets[role]
    own = [w for w in seen.workloads if w.role == role]
    return RoleStatus(
        replicas=target.replicas,
        ready=sum(w.ready for w in own),
        updated=sum(w.ready for w in own if w.revision == target.revision),
        revision=target.revision,
    )
