"""The rights that the operator uses, as data: the chart renders them, tests hold calls to them.

A router is granted rights by the operator, which Kubernetes allows only to who holds them itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock_operator.cluster.kinds import SERVICE

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Rule:
    """Verbs on resources of one API group."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    why: str

    def manifest(self) -> dict[str, Any]:
        """Return it as a ClusterRole has it."""
        return {
            "apiGroups": [self.group],
            "resources": list(self.resources),
            "verbs": list(self.verbs),
        }


_WATCH = ("list", "watch")
_APPLY = ("create", "patch", "delete")
_PENSTOCK = SERVICE.group

CLUSTER_RULES: tuple[Rule, ...] = (
    Rule(_PENSTOCK, ("inferenceservices",), ("get", *_WATCH), "what is wanted"),
    Rule(_PENSTOCK, ("inferenceservices/status",), ("patch",), "what was observed"),
    Rule(_PENSTOCK, ("rolescalers",), (*_WATCH, *_APPLY), "one for each role that may be scaled"),
    Rule(_PENSTOCK, ("rolescalers/status",), ("patch",), "what autoscalers read"),
    Rule(_PENSTOCK, ("rolescalers/scale",), ("get", "patch"), "to sleep; routers wake, so get too"),
    Rule("apps", ("deployments", "statefulsets"), (*_WATCH, *_APPLY), "workloads"),
    Rule("", ("services", "serviceaccounts"), (*_WATCH, *_APPLY), "shared by all revisions"),
    Rule(
        "rbac.authorization.k8s.io",
        ("roles", "rolebindings"),
        (*_WATCH, *_APPLY),
        "of routers: their discovery, and waking roles",
    ),
    Rule("networking.k8s.io", ("networkpolicies",), (*_WATCH, *_APPLY), "who reaches workers"),
    Rule("policy", ("poddisruptionbudgets",), (*_WATCH, *_APPLY), "what drains may take"),
    Rule(
        "",
        ("pods",),
        ("get", *_WATCH, "patch"),
        "readiness and faults; patch for the deletion cost; get because routers have it",
    ),
    Rule("", ("secrets",), ("create",), "the key pair of a service; never read"),
    Rule("", ("events",), ("list", "create"), "why a volume is not mounted; conditions that flip"),
)
"""In every namespace that is served."""

LEASE_RULES: tuple[Rule, ...] = (
    Rule("coordination.k8s.io", ("leases",), ("get", "create", "update"), "who leads"),
)
"""In the operator's own namespace."""


def allows(rules: Sequence[Rule], *, group: str, resource: str, verb: str) -> bool:
    """Return whether `rules` allow `verb` on `resource`, such as pods or deployments/scale."""
    return any(
        rule.group == group and resource in rule.resources and verb in rule.verbs for rule in rules
    )
