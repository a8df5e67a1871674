"""The control plane: etcd, API server, controllers, scheduler, DNS, in a namespace of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from e2e.cluster.cgroups import Cgroup
from e2e.cluster.errors import ProgramFailedError
from e2e.cluster.network import CONTROL, namespace
from e2e.cluster.process import Program
from e2e.cluster.settings import NAME
from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster.identity import Identity
    from e2e.cluster.kubectl import Kubectl
    from e2e.cluster.programs import Programs
    from e2e.cluster.settings import Settings

_START_SECONDS = 120
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What decides, without any node."""

    settings: Settings
    programs: Programs
    identity: Identity
    kubectl: Kubectl
    _started: list[Program] = field(default_factory=list)

    def start(self) -> None:
        """Start everything. Raises ProgramFailedError, NotInTimeError."""
        self._start(
            "etcd",
            *("etcd", "--data-dir", self._folder / "etcd", "--log-level", "warn"),
            # The machine may be taken away at any time, and with it all of this: no fsync.
            "--unsafe-no-fsync",
        )
        self.start_api_server()
        for name, *flags in (self._controllers(), self._scheduler()):
            self._start(name, self.programs / name, *flags)
        self._start_dns()

    def start_api_server(self) -> None:
        """Start the API server and wait until it serves. Raises as `start` does."""
        self._start("kube-apiserver", self.programs / "kube-apiserver", *self._api_server_flags())
        until("the API server is ready", self._api_server_ready, seconds=_START_SECONDS)

    def stop_api_server(self) -> None:
        """End it at once, as a crash does."""
        self._cgroup("kube-apiserver").kill()

    def _api_server_ready(self) -> bool:
        for program in self._started:
            program.check()
        try:
            return self.kubectl("get", "--raw", "/readyz", seconds=10).stdout == "ok"
        except ProgramFailedError as error:
            raise AssertionError(str(error)) from error

    def _api_server_flags(self) -> list[str | Path]:
        settings, identity = self.settings, self.identity
        return [
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={settings.control_address}",
            f"--tls-cert-file={identity / 'server.crt'}",
            f"--tls-private-key-file={identity / 'server.key'}",
            f"--client-ca-file={identity / 'ca.crt'}",
            f"--requestheader-client-ca-file={identity / 'ca.crt'}",
            "--requestheader-allowed-names=front-proxy-client",
            f"--token-auth-file={identity / 'tokens.csv'}",
            f"--service-account-key-file={identity / 'sa.pub'}",
            f"--service-account-signing-key-file={identity / 'sa.key'}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-cluster-ip-range={settings.service_range}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--kubelet-preferred-address-types=InternalIP",
            f"--default-not-ready-toleration-seconds={settings.toleration_seconds}",
            f"--default-unreachable-toleration-seconds={settings.toleration_seconds}",
            "--allow-privileged",
        ]

    def _controllers(self) -> list[str]:
        config = self.identity.kubeconfig("kube-controller-manager")
        return [
            "kube-controller-manager",
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={self.identity / 'sa.key'}",
            f"--root-ca-file={self.identity / 'ca.crt'}",
            f"--node-monitor-grace-period={self.settings.node_grace_seconds}s",
        ]

    def _scheduler(self) -> list[str]:
        config = self.identity.kubeconfig("kube-scheduler")
        return [
            "kube-scheduler",
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
        ]

    # --- DNS ----------------------------------------------------------------------------------

    def _start_dns(self) -> None:
        """DNS runs beside the API server; a Service without selector leads to it."""
        corefile = self._folder / "Corefile"
        corefile.write_text(
            ". {\n"
            f"  bind {self.settings.control_address}\n"
            "  errors\n"
            "  ready 127.0.0.1:8181\n"
            "  kubernetes cluster.local in-addr.arpa {\n"
            f"    kubeconfig {self.identity.kubeconfig('coredns')}\n"
            "  }\n"
            "}\n",
            encoding="utf-8",
        )
        objects = [*_DNS_RIGHTS, *_dns_service(self.settings)]
        self.kubectl.apply(*objects)
        self._start("coredns", self.programs.coredns, "-conf", corefile)

    # --- parts --------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        folder = self.settings.folder / CONTROL
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def _cgroup(name: str) -> Cgroup:
        return Cgroup(f"{NAME}/{CONTROL}/{name}")

    def _start(self, name: str, *command: str | Path) -> None:
        program = Program(
            name=name,
            command=command,
            namespace=namespace(CONTROL),
            cgroup=self._cgroup(name),
            log=self.settings.logs / f"{name}.log",
            environment={"PATH": _PATH},
        )
        program.start()
        self._started.append(program)


_RBAC = "rbac.authorization.k8s.io"
_DNS_RIGHTS: tuple[dict[str, Any], ...] = (
    {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["services", "pods", "namespaces"],
                "verbs": ["list", "watch"],
            },
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "verbs": ["list", "watch"],
            },
        ],
    },
    {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": _RBAC, "kind": "User", "name": "system:coredns"}],
    },
)


def _dns_service(settings: Settings) -> list[dict[str, Any]]:
    metadata = {"name": "kube-dns", "namespace": "kube-system"}
    ports = [{"name": p.lower(), "port": 53, "protocol": p} for p in ("UDP", "TCP")]
    slice_metadata = {**metadata, "labels": {"kubernetes.io/service-name": "kube-dns"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"clusterIP": settings.dns_address, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": slice_metadata,
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{"addresses": [settings.control_address], "conditions": {"ready": True}}],
        },
    ]
