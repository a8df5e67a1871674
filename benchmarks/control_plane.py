"""A Kubernetes control plane on the loopback address: etcd, API server, controllers.

No nodes: objects are stored, validated and collected as anywhere, and nothing runs. At least the
garbage collector is there: without it the objects of deleted services would stay for ever.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock_operator.cluster import rbac

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
OPERATOR = "operator"
_BUILT = Path.home() / ".cache" / "penstock-e2e"
_START_SECONDS = 90.0
_PROGRAMS = ("kube-apiserver", "kube-controller-manager")


def find_programs(folder: Path | None) -> Path:
    """Return the folder of kube-apiserver and kube-controller-manager. Raises SystemExit."""
    candidates = [folder] if folder else sorted(_BUILT.glob("kubernetes-*"), reverse=True)
    for candidate in candidates:
        if all((candidate / name).exists() for name in _PROGRAMS):
            return candidate
    raise SystemExit(
        f"no {' and '.join(_PROGRAMS)} found; let `e2e/run` build them, or give --kubernetes FOLDER"
    )


@dataclass(frozen=True)
class ControlPlane:
    """A running one."""

    folder: Path
    programs: Path
    port: int

    def kubeconfig(self, user: str) -> Path:
        """Return the kubeconfig of `admin` or of the operator."""
        return self.folder / f"{user}.kubeconfig"

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator and return what it printed."""
        done = subprocess.run(
            ["kubectl", "--kubeconfig", str(self.kubeconfig("admin")), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects."""
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(everything))


@contextmanager
def control_plane(
    folder: Path, *, programs: Path, controllers: bool, crds: Path = ROOT / "crds"
) -> Iterator[ControlPlane]:
    """Run one in an empty folder, with the CRDs and the operator's rights installed."""
    folder.mkdir(parents=True)
    plane = ControlPlane(folder, programs, _free_port())
    _make_identities(plane)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        etcd = f"http://127.0.0.1:{_free_port()}"
        processes.append(_start(folder, "etcd", *_etcd(folder, etcd)))
        processes.append(_start(folder, "kube-apiserver", *_api_server(plane, etcd)))
        _wait_ready(plane, processes)
        names = "*" if controllers else "garbage-collector-controller"
        processes.append(_start(folder, "kube-controller-manager", *_controllers(plane, names)))
        for crd in sorted(crds.glob("*.yaml")):
            plane.kubectl("apply", "--server-side", "-f", str(crd))
        plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        plane.apply(*_operator_rights())
        yield plane
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGKILL)
            process.wait(10)


def _etcd(folder: Path, url: str) -> list[str]:
    peer = f"http://127.0.0.1:{_free_port()}"
    return [
        shutil.which("etcd") or "etcd",
        *("--data-dir", str(folder / "etcd"), "--log-level", "error", "--unsafe-no-fsync"),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    ]


def _api_server(plane: ControlPlane, etcd: str) -> list[str]:
    return [
        str(plane.programs / "kube-apiserver"),
        f"--etcd-servers={etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={plane.port}",
        f"--cert-dir={plane.folder}/certificates",
        f"--token-auth-file={plane.folder}/tokens.csv",
        f"--service-account-key-file={plane.folder}/sa.pub",
        f"--service-account-signing-key-file={plane.folder}/sa.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=RBAC",
    ]


def _controllers(plane: ControlPlane, names: str) -> list[str]:
    return [
        str(plane.programs / "kube-controller-manager"),
        f"--kubeconfig={plane.kubeconfig('admin')}",
        f"--service-account-private-key-file={plane.folder}/sa.key",
        f"--controllers={names}",
        # As many requests as its work takes: the default of 20 a second is soon behind.
        *("--kube-api-qps=500", "--kube-api-burst=1000"),
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        f"--secure-port={_free_port()}",
        f"--cert-dir={plane.folder}/controllers",
    ]


def _make_identities(plane: ControlPlane) -> None:
    private, public = plane.folder / "sa.key", plane.folder / "sa.pub"
    subprocess.run(["openssl", "genrsa", "-out", private, "2048"], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", private, "-pubout", "-out", public],
        check=True,
        capture_output=True,
    )
    rows = []
    for user, group in (("admin", "system:masters"), (OPERATOR, "")):
        token = secrets.token_hex(16)
        rows.append(f'{token},{user},{user},"{group}"')
        cluster = {"server": f"https://127.0.0.1:{plane.port}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": user}}],
            "current-context": "bench",
        }
        plane.kubeconfig(user).write_text(json.dumps(config), encoding="utf-8")
    (plane.folder / "tokens.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _operator_rights() -> list[dict[str, Any]]:
    """Exactly what the operator says that it needs."""
    group = "rbac.authorization.k8s.io"
    rules = [rule.manifest() for rule in (*rbac.CLUSTER_RULES, *rbac.LEASE_RULES)]
    metadata = {"name": "penstock-operator"}
    return [
        {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": metadata["name"]},
            "subjects": [{"apiGroup": group, "kind": "User", "name": OPERATOR}],
        },
    ]


def _start(folder: Path, name: str, *command: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={"PATH": os.environ["PATH"], "HOME": str(folder)}
        )


def _wait_ready(plane: ControlPlane, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while plane.kubectl("get", "--raw", "/readyz", check=False) != "ok":
        dead = [process.args for process in processes if process.poll() is not None]
        if dead or time.monotonic() > deadline:
            raise RuntimeError(f"no API server within {_START_SECONDS:.0f} s; see {plane.folder}")
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
