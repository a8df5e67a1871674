"""A rendered pod to a process: what a kubelet does with a container, on one machine. Pure.

The container's command runs with its environment (downward API and Secrets resolved), `$(NAME)` put
into its arguments, and paths below mounted Secrets replaced by the local files. What differs on one
machine is appended to the arguments, where the last of equal flags wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock_operator import labels

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from penstock_operator.labels import Role

Object: TypeAlias = dict[str, Any]
END_TO_END_PATH = "/ready"
_LABEL_PATH = re.compile(r"metadata\.labels\['(?P<key>[^']+)'\]")
_REFERENCE = re.compile(r"\$(?:\$|\((?P<name>[A-Za-z_][A-Za-z0-9_.-]*)\))")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who a pod is."""

    name: str
    """As in Kubernetes, with the service's name in front."""
    short: str
    """As in `penstock ps`, without it."""
    namespace: str
    role: Role
    workload: str
    address: str
    stage: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the machine provides."""

    api: int
    """File descriptor of the API's listening socket, for routers to inherit."""
    hosts_file: Path
    endpoints_file: Path
    secrets: Mapping[str, Path]
    """Directory of each Secret, one file an entry."""
    programs: Mapping[str, tuple[str, ...]]
    threads: int
    """Threads for a worker whose manifest does not say."""


@dataclass(frozen=True, slots=True)
class Probe:
    """An HTTP probe; times in seconds."""

    url: str
    period: float
    timeout: float
    failures: int
    """In a row, before it counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A process to start and how to judge it."""

    identity: Identity
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment of the supervisor."""
    group: str
    revision: str
    control: str
    """host:port of a worker's control server, empty for a router."""
    http: str
    """host:port of health, metrics and, for a router, the API as this very process answers it."""
    inherits: tuple[int, ...]
    """File descriptors that the process keeps."""
    startup: Probe
    readiness: Probe
    """Of the pod: whether clients are sent to it."""
    liveness: Probe
    end_to_end: Probe | None
    """A router's: whether a request through it would succeed."""
    grace: float
    """Seconds between SIGTERM and SIGKILL in a rollout."""


def launch(template: Object, identity: Identity, around: Surroundings) -> Launch:
    """Return the process that stands for a pod of `template`.

    Raises KeyError for a field of the downward API that has no meaning on one machine.
    """
    spec, container = template["spec"], template["spec"]["containers"][0]
    pod_labels = {
        **template["metadata"]["labels"],
        labels.POD_INDEX: str(identity.stage),
    }
    mounts = _secret_mounts(spec, container, around)
    env = _environment(spec, container, identity, pod_labels, around)
    args = [_localize(substitute(arg, env), mounts) for arg in container.get("args", [])]
    router = identity.role == "router"
    http = f"{identity.address}:{labels.HTTP_PORT}"
    return Launch(
        identity=identity,
        argv=(*_program(container["command"], around), *args, *_overrides(args, identity, around)),
        env=env,
        group=pod_labels.get(labels.GROUP, ""),
        revision=pod_labels[labels.REVISION],
        control="" if router else f"{identity.address}:{labels.CONTROL_PORT}",
        http=http,
        inherits=(around.api,) if router else (),
        startup=_probe(container["startupProbe"], http),
        readiness=_probe(container["readinessProbe"], http),
        liveness=_probe(container["livenessProbe"], http),
        end_to_end=_end_to_end(container["readinessProbe"], http) if router else None,
        grace=float(spec["terminationGracePeriodSeconds"]),
    )


def substitute(text: str, env: Mapping[str, str]) -> str:
    """Return `text` with $(NAME) replaced; $$(NAME) stays as $(NAME), unknown names as they are."""

    def value(match: re.Match[str]) -> str:
        name = match["name"]
        return "$" if name is None else env.get(name, match[0])

    return _REFERENCE.sub(value, text)


def threads_for_workers(cores: int, workers: int) -> int:
    """Return compute threads a worker: an even share of the cores, at least one.

    Workers of a pipeline and decode workers compute at the same time, and oversubscribed cores make
    every step wait for the slowest thread.
    """
    return max(1, cores // max(1, workers))


def _program(command: list[str], around: Surroundings) -> tuple[str, ...]:
    return (*around.programs.get(command[0], (command[0],)), *command[1:])


def _overrides(args: list[str], identity: Identity, around: Surroundings) -> list[str]:
    if identity.role == "router":
        # At its own address it is probed, as a pod is; clients come by the shared socket, as by a
        # Service.
        listen = ["--host", identity.address, "--port", str(labels.HTTP_PORT)]
        return [*listen, "--fd", str(around.api), "--discovery", f"file:{around.endpoints_file}"]
    threads = [] if "--threads" in args else ["--threads", str(around.threads)]
    # Every process is on this machine: KV and activations are not offered to any other.
    return ["--hosts-file", str(around.hosts_file), "--net-device", "lo", *threads]


def _environment(
    spec: Object,
    container: Object,
    identity: Identity,
    pod_labels: Mapping[str, str],
    around: Surroundings,
) -> dict[str, str]:
    """Resolve the container's environment.

    Values that point into an emptyDir are left out: there the user's own cache is used.
    """
    scratch = _mounts_of(spec, container, "emptyDir")
    env: dict[str, str] = {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "fieldRef" in source:
            env[entry["name"]] = _field(source["fieldRef"]["fieldPath"], identity, pod_labels)
        elif "secretKeyRef" in source:
            directory = around.secrets.get(source["secretKeyRef"]["name"])
            if directory is not None:
                file = directory / source["secretKeyRef"]["key"]
                env[entry["name"]] = file.read_text(encoding="utf-8").strip()
        elif not any(_below(entry.get("value", ""), path) for path in scratch):
            env[entry["name"]] = substitute(entry.get("value", ""), env)
    return env


def _field(path: str, identity: Identity, pod_labels: Mapping[str, str]) -> str:
    fields = {
        "metadata.name": identity.name,
        "metadata.namespace": identity.namespace,
        "status.podIP": identity.address,
        "status.hostIP": identity.address,
        "spec.nodeName": identity.name,
    }
    match = _LABEL_PATH.fullmatch(path)
    return pod_labels[match["key"]] if match else fields[path]


def _secret_mounts(spec: Object, container: Object, around: Surroundings) -> dict[str, Path]:
    """Return the local directory of each path where a Secret is mounted that exists here."""
    mounts = _mounts_of(spec, container, "secret")
    return {
        path: around.secrets[source["secretName"]]
        for path, source in mounts.items()
        if source["secretName"] in around.secrets
    }


def _mounts_of(spec: Object, container: Object, kind: str) -> dict[str, Object]:
    sources = {v["name"]: v[kind] for v in spec.get("volumes", []) if kind in v}
    return {
        mount["mountPath"]: sources[mount["name"]]
        for mount in container.get("volumeMounts", [])
        if mount["name"] in sources
    }


def _localize(arg: str, mounts: Mapping[str, Path]) -> str:
    for path, directory in mounts.items():
        if _below(arg, path):
            return str(directory) + arg.removeprefix(path)
    return arg


def _below(text: str, path: str) -> bool:
    return text == path or text.startswith(path + "/")


def _end_to_end(readiness: Object, http: str) -> Probe:
    """The pod's own readiness lasts while a request would be held; this one is asked beside it."""
    return replace(_probe(readiness, http), url=f"http://{http}{END_TO_END_PATH}")


def _probe(probe: Object, http: str) -> Probe:
    return Probe(
        url=f"http://{http}{probe['httpGet']['path']}",
        period=float(probe["periodSeconds"]),
        timeout=float(probe["timeoutSeconds"]),
        failures=int(probe["failureThreshold"]),
    )
