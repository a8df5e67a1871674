"""Spec to Kubernetes objects, as plain dicts to be applied on the server. Pure.

One service renders to

    per prefill group    StatefulSet NAME-prefill-I of P pods; the ordinal is the stage
    per revision         Deployment NAME-decode-REVISION, Deployment NAME-router-REVISION
    once                 Services NAME-workers (headless) and NAME-router, Secret NAME-keys,
                         ServiceAccount, Role and RoleBinding of the router's discovery,
                         NetworkPolicy, PodDisruptionBudgets
    per role that scales RoleScaler NAME-ROLE

A revision is a hash of the pod template, so it changes exactly when pods have to be replaced, and
each role has its own. Workloads are never changed in place: a new revision is a new object, and
`planner` says when replicas move from one to the other.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock_operator import labels, podspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock_operator.api import InferenceService
    from penstock_operator.labels import Role

Object: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What objects need beside the spec."""

    keys: Mapping[str, str] | None = None
    """Entries of the key Secret. None: the Secret is left out, somebody else owns it."""
    owner: Mapping[str, Any] | None = None
    """Owner reference put on every object, so that deleting the service deletes them."""


def render(service: InferenceService, inputs: Inputs) -> list[Object]:
    """Return every object of the service as it is when no rollout is under way."""
    prefill = service.spec.prefill
    groups = range(prefill.wanted if prefill else 0)
    return [
        *shared_objects(service, inputs),
        *role_scalers(service, inputs, new=True),
        *(prefill_group(service, index, inputs) for index in groups),
        deployment(service, "decode", service.spec.decode.wanted, inputs),
        deployment(service, "router", service.spec.router.wanted, inputs),
    ]


def revision(service: InferenceService, role: Role) -> str:
    """Return the hash of what decides the pods of `role`. Raises KeyError if it has none."""
    return _digest(podspec.pod_template(service, role, revision="", layout="", index=0))


def layout(service: InferenceService) -> str:
    """Return the hash of what workers must share to exchange KV, and a router to feed them."""
    model = service.spec.model
    identity = [model.uri, model.revision, model.dtype, service.spec.kv_cache.page_size]
    return _digest(identity)


def group_name(service: InferenceService, index: int) -> str:
    """Return the name of a prefill group, which is its StatefulSet's."""
    return f"{service.name}-prefill-{index}"


def router_url(service: InferenceService) -> str:
    """Return where the API answers inside the cluster."""
    host = f"{service.name}-router.{service.metadata.namespace}.svc"
    return f"http://{host}:{service.spec.router.port}"


# --- workloads --------------------------------------------------------------------------------


def prefill_group(service: InferenceService, index: int, inputs: Inputs) -> Object:
    """Return the StatefulSet of one prefill group: a pod a stage, all started at once."""
    prefill = service.spec.prefill
    if prefill is None:
        raise KeyError("the service has no prefill")
    template = _template(service, "prefill", index)
    return _object(
        service,
        inputs,
        "apps/v1",
        "StatefulSet",
        group_name(service, index),
        extra_labels=_identity(template),
        spec={
            "replicas": prefill.pipeline_parallel,
            "serviceName": podspec.workers_service(service),
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": _selector(template, labels.GROUP)},
            "template": template,
        },
    )


def deployment(service: InferenceService, role: Role, replicas: int, inputs: Inputs) -> Object:
    """Return the Deployment of the newest revision of `role` (decode or router)."""
    template = _template(service, role, 0)
    own = template["metadata"]["labels"][labels.REVISION]
    return _object(
        service,
        inputs,
        "apps/v1",
        "Deployment",
        f"{service.name}-{role}-{own}",
        extra_labels=_identity(template),
        spec={
            "replicas": replicas,
            "selector": {"matchLabels": _selector(template, labels.REVISION)},
            "template": template,
        },
    )


def _template(service: InferenceService, role: Role, index: int) -> Object:
    return podspec.pod_template(
        service, role, revision=revision(service, role), layout=layout(service), index=index
    )


def _selector(template: Object, distinguishing: str) -> dict[str, str]:
    own = template["metadata"]["labels"]
    return {key: own[key] for key in (labels.SERVICE, labels.ROLE, distinguishing)}


def _identity(template: Object) -> dict[str, str]:
    own = template["metadata"]["labels"]
    keys = (labels.ROLE, labels.GROUP, labels.REVISION, labels.LAYOUT)
    return {key: own[key] for key in keys if key in own}


# --- objects there is one of ------------------------------------------------------------------


def shared_objects(service: InferenceService, inputs: Inputs) -> list[Object]:
    """Return the objects that all revisions share."""
    objects = [
        _workers_service(service, inputs),
        _router_service(service, inputs),
        *_discovery_rights(service, inputs),
        _network_policy(service, inputs),
        *_disruption_budgets(service, inputs),
    ]
    if inputs.keys is not None:
        objects.append(_key_secret(service, inputs, inputs.keys))
    return objects


def role_scalers(service: InferenceService, inputs: Inputs, *, new: bool) -> list[Object]:
    """Return the RoleScaler of each role whose number the manifest does not own.

    Args:
        service: whose roles are scaled.
        inputs: as for other objects.
        new: with the number to begin with, for a create. Without it they are for an apply, which
            would otherwise take the number back from whoever has scaled the role since.
    """
    scalers = []
    for role in labels.ROLES:
        part = service.spec.role(role)
        if part is None or part.replicas is not None:
            continue
        number = {"replicas": part.wanted} if new else {}
        scalers.append(
            _object(
                service,
                inputs,
                "penstock.dev/v1alpha1",
                "RoleScaler",
                podspec.scaler_name(service, role),
                extra_labels={labels.ROLE: role},
                spec={"service": service.name, "role": role, **number},
            )
        )
    return scalers


def _workers_service(service: InferenceService, inputs: Inputs) -> Object:
    """Not-ready addresses too: stages must find each other before any of them is ready."""
    return _object(
        service,
        inputs,
        "v1",
        "Service",
        podspec.workers_service(service),
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {
                labels.SERVICE: service.name,
                "app.kubernetes.io/component": podspec.WORKER_COMPONENT,
            },
            "ports": [
                _service_port("control", labels.CONTROL_PORT),
                _service_port("http", labels.HTTP_PORT),
            ],
        },
    )


def _router_service(service: InferenceService, inputs: Inputs) -> Object:
    return _object(
        service,
        inputs,
        "v1",
        "Service",
        f"{service.name}-router",
        spec={
            "selector": _role_selector(service, "router"),
            "ports": [_service_port("http", service.spec.router.port)],
        },
    )


def _key_secret(service: InferenceService, inputs: Inputs, keys: Mapping[str, str]) -> Object:
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    return _object(
        service, inputs, "v1", "Secret", podspec.key_secret(service), type="Opaque", data=data
    )


def _discovery_rights(service: InferenceService, inputs: Inputs) -> list[Object]:
    """The router lists and watches pods of its namespace, wakes roles, and may do nothing else."""
    name = podspec.router_account(service)
    group = "rbac.authorization.k8s.io"
    rules: list[Object] = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    if waking := podspec.waking_roles(service):
        rules.append(
            {
                "apiGroups": ["penstock.dev"],
                "resources": ["rolescalers/scale"],
                "resourceNames": [podspec.scaler_name(service, role) for role in waking],
                "verbs": ["get", "patch"],
            }
        )
    return [
        _object(service, inputs, "v1", "ServiceAccount", name),
        _object(service, inputs, f"{group}/v1", "Role", name, rules=rules),
        _object(
            service,
            inputs,
            f"{group}/v1",
            "RoleBinding",
            name,
            roleRef={"apiGroup": group, "kind": "Role", "name": name},
            subjects=[
                {
                    "kind": "ServiceAccount",
                    "name": name,
                    "namespace": service.metadata.namespace,
                }
            ],
        ),
    ]


def _network_policy(service: InferenceService, inputs: Inputs) -> Object:
    """Only this service's pods reach worker ports; metrics and health are open to the cluster.

    All ports, not only the control port: transfers use ports that the system chooses.
    """
    own_pods = {"podSelector": {"matchLabels": {labels.SERVICE: service.name}}}
    return _object(
        service,
        inputs,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        podspec.workers_service(service),
        spec={
            "podSelector": {
                "matchLabels": {
                    labels.SERVICE: service.name,
                    "app.kubernetes.io/component": podspec.WORKER_COMPONENT,
                }
            },
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [own_pods]},
                {"ports": [{"protocol": "TCP", "port": labels.HTTP_PORT}]},
            ],
        },
    )


def _disruption_budgets(service: InferenceService, inputs: Inputs) -> list[Object]:
    """One pod of a role at a time: for prefill that is one group at a time, whatever its size."""
    return [
        _object(
            service,
            inputs,
            "policy/v1",
            "PodDisruptionBudget",
            f"{service.name}-{role}",
            spec={
                "maxUnavailable": 1,
                "selector": {"matchLabels": _role_selector(service, role)},
            },
        )
        for role in labels.ROLES
        if service.spec.role(role) is not None
    ]


# --- common -----------------------------------------------------------------------------------


def _service_port(name: str, number: int) -> Object:
    # With the protocol, although TCP is the default: it is part of the key by which applies merge.
    return {"name": name, "port": number, "protocol": "TCP", "targetPort": name}


def _role_selector(service: InferenceService, role: Role) -> dict[str, str]:
    return {labels.SERVICE: service.name, labels.ROLE: role}


def _object(
    service: InferenceService,
    inputs: Inputs,
    api_version: str,
    kind: str,
    name: str,
    *,
    extra_labels: Mapping[str, str] | None = None,
    **body: Any,
) -> Object:
    metadata: Object = {
        "name": name,
        "namespace": service.metadata.namespace,
        "labels": {**podspec.common_labels(service), **(extra_labels or {})},
    }
    if inputs.owner is not None:
        metadata["ownerReferences"] = [dict(inputs.owner)]
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
