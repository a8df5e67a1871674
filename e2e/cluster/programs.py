"""The programs that the cluster is made of.

Debian's packages are installed if this process may; what Debian does not have is built from Go
modules into the cache: Kubernetes (`main.go`), its DNS server (`dns/`), and Helm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import cache
from e2e.cluster.errors import NotOnThisMachineError, ProgramFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SOURCE = Path(__file__).parent
_KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)
_HELM = "helm.sh/helm/v3/cmd/helm@v3.22.0"
_BUILD_SECONDS = 1800
CNI_PLUGINS = Path("/usr/lib/cni")
_PACKAGES: Mapping[str, str] = {
    "containerd": "containerd",
    "runc": "runc",
    "etcd": "etcd-server",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "debootstrap": "debootstrap",
    str(CNI_PLUGINS / "ptp"): "containernetworking-plugins",
}
"""Program and the Debian package that has it."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Where everything is."""

    kubernetes: Path
    """Folder with one link a Kubernetes program, and `pause`."""
    coredns: Path
    helm: Path

    def __truediv__(self, name: str) -> Path:
        """Return the path of a Kubernetes program."""
        return self.kubernetes / name


def require_debian_packages() -> None:
    """Install what is missing. Raises NotOnThisMachineError if that is not possible."""
    missing = sorted({package for program, package in _PACKAGES.items() if not _found(program)})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NotOnThisMachineError(
            f"missing: {', '.join(missing)}. Install these Debian packages, or run as root on "
            "Debian so that they can be installed"
        )
    print(f"installing {', '.join(missing)}", flush=True)
    # Services that packages bring are not started: the cluster runs its own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    _build(["apt-get", "-qq", "update"], environment)
    _build(["apt-get", "-qq", "-y", "--no-install-recommends", "install", *missing], environment)


def require_root() -> None:
    """Raise NotOnThisMachineError unless this is root: namespaces and mounts need it."""
    if os.geteuid() != 0:
        raise NotOnThisMachineError("the cluster needs root: run it with sudo")


def build() -> Programs:
    """Return the programs, built if they are not in the cache (minutes)."""
    kubernetes = cache.cached(_name("kubernetes", "main.go", "pause/main.go"), _build_kubernetes)
    dns = cache.cached(_name("dns", "dns/main.go", "dns/go.mod"), _build_dns)
    helm = cache.cached(f"helm-{cache.key(_HELM)}", _build_helm)
    return Programs(kubernetes, dns / "coredns", helm / "helm")


def _name(program: str, *sources: str) -> str:
    """Return a name in the cache that changes with these files and Kubernetes' versions."""
    inputs = [(_SOURCE / source).read_bytes() for source in ("go.mod", *sources)]
    return f"{program}-{cache.key(*inputs)}"


def _build_kubernetes(folder: Path) -> None:
    version = _version_of("k8s.io/kubernetes")
    print(f"building Kubernetes {version}: about five minutes on two cores", flush=True)
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion={version}"
    _build_module(_SOURCE, ".", folder / "kubernetes", flags)
    _build_module(_SOURCE, "./pause", folder / "pause", "-s -w")
    for name in _KUBERNETES:
        (folder / name).symlink_to("kubernetes")


def _build_dns(folder: Path) -> None:
    print("building CoreDNS: about two minutes on two cores", flush=True)
    _build_module(_SOURCE / "dns", ".", folder / "coredns", "-s -w")


def _build_module(module: Path, package: str, program: Path, linker_flags: str) -> None:
    go = [_go(), "build", "-C", str(module), "-trimpath", "-buildvcs=false"]
    _build([*go, "-ldflags", linker_flags, "-o", str(program), package], _static())


def _build_helm(folder: Path) -> None:
    print(f"building {_HELM}: about four minutes on two cores", flush=True)
    go = [_go(), "install", "-trimpath", "-ldflags", "-s -w", _HELM]
    _build(go, {**_static(), "GOBIN": str(folder)})


def _version_of(module: str) -> str:
    for line in (_SOURCE / "go.mod").read_text(encoding="utf-8").splitlines():
        if line.split()[:1] == [module]:
            return line.split()[1]
    raise KeyError(module)


def _go() -> str:
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if found is None:
        raise NotOnThisMachineError("Go is missing: install it, 1.26 or newer, and put it on PATH")
    return found


def _static() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0"}


def _build(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise ProgramFailedError(f"{' '.join(command)}: exit {done.returncode}:\n{said}")


def _found(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None
