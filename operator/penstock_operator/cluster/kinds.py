"""The kinds of objects that the operator reads and writes, and where the API keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from penstock_operator import api, scaler

Object: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str]
"""Namespace and name of an InferenceService."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind, in the version that is spoken here."""

    name: str
    group: str
    """Empty for the core group."""
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """As objects say it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the path of an object, of all in a namespace, or of all."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if namespace:
            parts += ["namespaces", namespace]
        return "/" + "/".join(filter(None, [*parts, self.plural, name, subresource]))


def _penstock(name: str, plural: str) -> Kind:
    group, _, version = api.API_VERSION.partition("/")
    return Kind(name, group, version, plural)


SERVICE = _penstock(api.KIND, "inferenceservices")
SCALER = _penstock(scaler.KIND, "rolescalers")
DEPLOYMENT = Kind("Deployment", "apps", "v1", "deployments")
STATEFUL_SET = Kind("StatefulSet", "apps", "v1", "statefulsets")
POD = Kind("Pod", "", "v1", "pods")
SECRET = Kind("Secret", "", "v1", "secrets")
EVENT = Kind("Event", "", "v1", "events")
LEASE = Kind("Lease", "coordination.k8s.io", "v1", "leases")

SHARED = (
    Kind("Service", "", "v1", "services"),
    Kind("ServiceAccount", "", "v1", "serviceaccounts"),
    Kind("Role", "rbac.authorization.k8s.io", "v1", "roles"),
    Kind("RoleBinding", "rbac.authorization.k8s.io", "v1", "rolebindings"),
    Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies"),
    Kind("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets"),
    SCALER,
)
"""Of these a service has objects that all its revisions share; they are applied and pruned."""
WATCHED = (*SHARED, DEPLOYMENT, STATEFUL_SET, POD)
"""Children: objects with the label of a service."""

_BY_NAME = {kind.name: kind for kind in (*WATCHED, SERVICE, SECRET, EVENT, LEASE)}


def kind_of(obj: Object) -> Kind:
    """Return the kind of a rendered object. Raises KeyError for one that is not known here."""
    return _BY_NAME[obj["kind"]]
