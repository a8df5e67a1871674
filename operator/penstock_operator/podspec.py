"""The pods of each role: containers, their commands, probes, volumes. Pure.

`$(NAME)` in arguments is an environment variable of the container that the kubelet, or the local
executor, puts in.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock_operator import labels
from penstock_operator.api import ROUTER_IMAGE, RUNTIME_IMAGE
from penstock_operator.model_volume import (
    cache_env,
    model_argument,
    model_volumes,
    token_path,
)
from penstock_operator.quantity import canonical_quantity, parse_quantity

if TYPE_CHECKING:
    from penstock_operator.api import (
        ChunkedPrefill,
        Decode,
        InferenceService,
        Prefill,
        Resources,
        RoleSpec,
        Spec,
    )
    from penstock_operator.labels import Role

Object: TypeAlias = dict[str, Any]

WORKER_COMPONENT = "worker"
GRACE_SECONDS = 600
"""How long a pod may drain: the longest stream that a rollout lets finish. Ten minutes hold about
20,000 tokens at 30 ms each."""
DRAIN_SECONDS = GRACE_SECONDS - 15
"""How long a process lets its streams go on: it must end by itself before it is killed."""
PREFILL_CHUNK_TOKENS = 2048
DECODE_CHUNK_TOKENS = 512
CPU_KV_MEMORY = "1Gi"
CUDA_KV_SHARE = "90%"
"""Of what the weights leave of the device: the rest is for activations."""
ROUTER_LEAVE_SECONDS = 5
"""How long a router goes on accepting after its end was decided, until every node knows."""
USER_ID = 10001


def workers_service(service: InferenceService) -> str:
    """Return the name of the headless Service of the workers."""
    return f"{service.name}-workers"


def key_secret(service: InferenceService) -> str:
    """Return the name of the Secret with the CURVE key pair."""
    return f"{service.name}-keys"


def scaler_name(service: InferenceService, role: Role) -> str:
    """Return the name of the RoleScaler of a role."""
    return f"{service.name}-{role}"


def waking_roles(service: InferenceService) -> list[Role]:
    """Return the roles that may be scaled to zero, and that a request wakes."""
    found: list[Role] = []
    for role in labels.ROLES:
        part = service.spec.role(role)
        if part is not None and part.bounds[0] == 0:
            found.append(role)
    return found


def router_account(service: InferenceService) -> str:
    """Return the name of the router's ServiceAccount."""
    return f"{service.name}-router"


def common_labels(service: InferenceService) -> dict[str, str]:
    """Return the labels of every object of the service."""
    return {
        "app.kubernetes.io/name": "penstock",
        "app.kubernetes.io/instance": service.name,
        "app.kubernetes.io/managed-by": "penstock",
        labels.SERVICE: service.name,
    }


def pod_template(
    service: InferenceService, role: Role, *, revision: str, layout: str, index: int
) -> Object:
    """Return the pod template of `role`, for prefill that of group `index`.

    Raises KeyError if the service has no such role.
    """
    part = service.spec.role(role)
    if part is None:
        raise KeyError(f"the service has no {role}")
    build = _router_pod if role == "router" else _worker_pod
    group = {labels.GROUP: f"{service.name}-prefill-{index}"} if role == "prefill" else {}
    own = {
        **common_labels(service),
        "app.kubernetes.io/component": "router" if role == "router" else WORKER_COMPONENT,
        labels.ROLE: role,
        **group,
        labels.REVISION: revision,
        labels.LAYOUT: layout,
    }
    template: Object = {
        "metadata": {"labels": own},
        "spec": {
            **build(service, role, part, revision, index),
            **_pod_defaults(service, own, role),
        },
    }
    patched: Object = _merge(template, part.pod_template)
    patched["metadata"]["labels"].update(own)
    return patched


# --- workers ----------------------------------------------------------------------------------


def _worker_pod(
    service: InferenceService, role: Role, part: RoleSpec, revision: str, index: int
) -> Object:
    env = [
        _field_env("POD_NAME", "metadata.name"),
        _field_env("POD_IP", "status.podIP"),
        *cache_env(service),
    ]
    if role == "prefill":
        env.append(_field_env("POD_INDEX", f"metadata.labels['{labels.POD_INDEX}']"))
    volumes, mounts = _volumes(service)
    container: Object = {
        "name": "worker",
        "image": service.spec.image.runtime or RUNTIME_IMAGE,
        "imagePullPolicy": service.spec.image.pull_policy,
        "command": ["penstock-worker"],
        "args": [*_worker_args(service, role, part, revision, index), *part.extra_args],
        "env": env,
        "ports": [
            _port("control", labels.CONTROL_PORT),
            _port("http", labels.HTTP_PORT),
        ],
        **_probes("/healthz", "/readyz", liveness_failures=6),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
        "securityContext": _security(part.resources),
        **_resources(part.resources),
    }
    return {
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes,
    }


def _worker_args(
    service: InferenceService, role: Role, part: RoleSpec, revision: str, index: int
) -> list[str]:
    spec = service.spec
    args = ["--role", role, "--name", "$(POD_NAME)", "--model", model_argument(service)]
    args += [
        "--bind",
        f"$(POD_IP):{labels.CONTROL_PORT}",
        "--http",
        f"$(POD_IP):{labels.HTTP_PORT}",
    ]
    args += ["--keys", labels.KEYS_MOUNT, "--device", spec.computes_on, "--dtype", spec.model.dtype]
    args += _token_args(service, "--model-token-file")
    if part.resources.rdma is not None:
        args.append("--rdma")
    args += ["--kv-memory", _kv_memory(spec)]
    args += ["--page-size", str(spec.kv_cache.page_size)]
    if spec.model.max_model_len is not None:
        args += ["--max-model-len", str(spec.model.max_model_len)]
    if part.resources.cpu is not None:
        args += ["--threads", str(math.ceil(parse_quantity(part.resources.cpu)))]
    if role == "prefill" and spec.prefill is not None:
        group = f"{service.name}-prefill-{index}"
        domain = f"{workers_service(service)}.{service.metadata.namespace}.svc"
        args += ["--group", group, "--stage", "$(POD_INDEX)"]
        args += ["--stages", str(spec.prefill.pipeline_parallel)]
        if spec.prefill.layers_per_stage is not None:
            counts = ",".join(f"{count:g}" for count in spec.prefill.layers_per_stage)
            args += ["--layers-per-stage", counts]
        args += ["--peers", f"{group}-{{i}}.{domain}:{labels.CONTROL_PORT}"]
        args += _rank_args(spec.prefill)
        args += _chunk_args(spec.prefill.chunked_prefill, PREFILL_CHUNK_TOKENS)
    elif role == "decode":
        args += _rank_args(spec.decode)
        args += _chunk_args(spec.decode.chunked_prefill, DECODE_CHUNK_TOKENS)
    return [*args, "--drain-seconds", str(DRAIN_SECONDS), "--revision", revision]


def _rank_args(part: Prefill | Decode) -> list[str]:
    ranks = part.tensor_parallel
    return ["--tensor-parallel", str(ranks)] if ranks > 1 else []


def _kv_memory(spec: Spec) -> str:
    if spec.kv_cache.memory is None and spec.computes_on == "cuda":
        return CUDA_KV_SHARE
    return str(math.floor(parse_quantity(spec.kv_cache.memory or CPU_KV_MEMORY)))


def _chunk_args(chunks: ChunkedPrefill, default_tokens: int) -> list[str]:
    tokens = chunks.max_tokens or default_tokens
    return ["--chunk-mode", chunks.mode, "--max-chunk-tokens", str(tokens)]


def _token_args(service: InferenceService, flag: str) -> list[str]:
    path = token_path(service)
    return [] if path is None else [flag, path]


# --- router -----------------------------------------------------------------------------------


def _router_pod(
    service: InferenceService, role: Role, part: RoleSpec, revision: str, index: int
) -> Object:
    del role, index  # one kind of router
    spec = service.spec
    volumes, mounts = _volumes(service)
    if spec.router.api_key_secret is not None:
        volumes.append(_secret_volume("api-key", spec.router.api_key_secret))
        mounts.append(_mount("api-key", labels.API_KEY_MOUNT))
    container: Object = {
        "name": "router",
        "image": spec.image.router or ROUTER_IMAGE,
        "imagePullPolicy": spec.image.pull_policy,
        "command": ["penstock-router"],
        "args": [*_router_args(service, revision), *part.extra_args],
        "env": [_field_env("POD_NAME", "metadata.name"), *cache_env(service)],
        "ports": [_port("http", spec.router.port)],
        **_probes("/health", "/accepting", liveness_failures=3),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "lifecycle": {"preStop": {"sleep": {"seconds": ROUTER_LEAVE_SECONDS}}},
        "volumeMounts": mounts,
        "securityContext": _security(part.resources),
        **_resources(part.resources),
    }
    return {
        "serviceAccountName": router_account(service),
        "containers": [container],
        "volumes": volumes,
    }


def _router_args(service: InferenceService, revision: str) -> list[str]:
    spec = service.spec
    discovery = f"kubernetes:{service.metadata.namespace}/{labels.SERVICE}={service.name}"
    args = ["--name", "$(POD_NAME)", "--model", model_argument(service)]
    args += ["--served-model-name", spec.model.served_name]
    args += _token_args(service, "--hf-token-file")
    args += ["--host", "0.0.0.0", "--port", str(spec.router.port)]  # noqa: S104 - inside its pod
    args += ["--discovery", discovery, "--keys", labels.KEYS_MOUNT]
    args.append("--require-prefill" if spec.prefill else "--no-require-prefill")
    for waking in waking_roles(service):
        args += ["--wake", f"{waking}={scaler_name(service, waking)}"]
    if spec.router.api_key_secret is not None:
        args += ["--api-key-file", f"{labels.API_KEY_MOUNT}/{labels.API_KEY_ENTRY}"]
    return [*args, "--drain-seconds", str(DRAIN_SECONDS), "--revision", revision]


# --- parts ------------------------------------------------------------------------------------


def _volumes(service: InferenceService) -> tuple[list[Object], list[Object]]:
    """Return the volumes and their mounts that every role has.

    The cache has no size limit: the size of a model is not known here, and a pod over its limit is
    evicted while it serves. The node's own eviction protects the node; a limit can be patched in.
    """
    volumes = [
        _secret_volume("keys", key_secret(service)),
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Object] = [
        _mount("keys", labels.KEYS_MOUNT),
        {"name": "cache", "mountPath": labels.CACHE_MOUNT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
    ]
    of_model, model_mounts = model_volumes(service)
    return [*volumes, *of_model], [*mounts, *model_mounts]


def _secret_volume(name: str, secret: str) -> Object:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}


def _mount(name: str, path: str) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True}


def _port(name: str, number: int) -> Object:
    # With the protocol, although TCP is the default: it is part of the key by which applies merge.
    return {"name": name, "containerPort": number, "protocol": "TCP"}


def _field_env(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _probes(alive: str, ready: str, *, liveness_failures: int) -> Object:
    """Probes over HTTP. The server answers `alive` before weights are loaded.

    So the start-up probe covers imports only, five minutes of them for libraries of gigabytes on a
    cold disk, and weights of any size load while the pod is alive and not ready. Liveness is slow
    to judge: a stopped or swapped-out process is left a minute to come back, since killing it loses
    its KV.
    """

    def probe(path: str, period: int, timeout: int, failures: int) -> Object:
        return {
            "httpGet": {"path": path, "port": "http"},
            "periodSeconds": period,
            "timeoutSeconds": timeout,
            "failureThreshold": failures,
        }

    return {
        "startupProbe": probe(alive, 2, 2, 150),
        "readinessProbe": probe(ready, 2, 2, 2),
        "livenessProbe": probe(alive, 10, 5, liveness_failures),
    }


def _resources(resources: Resources) -> Object:
    amounts: Object = {}
    if resources.cpu is not None:
        amounts["cpu"] = canonical_quantity(resources.cpu)
    if resources.memory is not None:
        amounts["memory"] = canonical_quantity(resources.memory)
    if resources.gpu:
        amounts["nvidia.com/gpu"] = str(resources.gpu)
    if resources.rdma is not None:
        amounts[resources.rdma.resource] = str(resources.rdma.count)
    return {"resources": {"requests": amounts, "limits": dict(amounts)}} if amounts else {}


def _security(resources: Resources) -> Object:
    capabilities: Object = {"drop": ["ALL"]}
    if resources.rdma is not None:
        capabilities["add"] = ["IPC_LOCK"]  # pins the memory that devices write
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": capabilities,
    }


def _pod_defaults(service: InferenceService, own: dict[str, str], role: Role) -> Object:
    spread = labels.GROUP if role == "prefill" else labels.ROLE
    defaults: Object = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        # The kernel drops a SIGTERM to process 1 that has no handler yet: a pod deleted while it
        # still imports would stay for its whole grace time. So process 1 is the pod's pause.
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            # A volume of weights is not walked through at every start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {
                    "matchLabels": {labels.SERVICE: service.name, spread: own[spread]}
                },
            }
        ],
    }
    if service.spec.image.pull_secrets:
        defaults["imagePullSecrets"] = [{"name": name} for name in service.spec.image.pull_secrets]
    return defaults


def _merge(base: Any, patch: Any, *, whole: bool = False) -> Any:
    """Return `base` with `patch` put over it; neither is changed.

    With `whole`, things of one name replace each other: a volume has one source.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for key, value in patch.items():
            old = base.get(key)
            merged[key] = (
                copy.deepcopy(value) if old is None else _merge(old, value, whole=key == "volumes")
            )
        return merged
    if _named(base) and _named(patch):
        patches = {item["name"]: item for item in patch}
        kept = [_take(item, patches.pop(item["name"], None), whole=whole) for item in base]
        return [*kept, *copy.deepcopy(list(patches.values()))]
    return copy.deepcopy(patch)


def _take(base: Object, patch: Object | None, *, whole: bool) -> Any:
    if patch is None:
        return base
    return copy.deepcopy(patch) if whole else _merge(base, patch)


def _named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "name" in item for item in value)
    )
