"""A node: containerd, kubelet and kube-proxy in a network namespace and a cgroup of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from e2e.cluster import containerd, mounts
from e2e.cluster.cgroups import Cgroup
from e2e.cluster.network import namespace
from e2e.cluster.process import Program, run
from e2e.cluster.programs import CNI_PLUGINS
from e2e.cluster.settings import NAME
from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster.identity import Identity
    from e2e.cluster.programs import Programs
    from e2e.cluster.settings import Settings

_START_SECONDS = 60
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Node:
    """One node. Its containerd's root must hold the images before it starts."""

    name: str
    settings: Settings
    programs: Programs
    identity: Identity
    _started: list[Program] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Everything the node writes, its logs apart."""
        return self.settings.folder / self.name

    @property
    def containerd(self) -> containerd.Folders:
        """Where its containerd keeps things."""
        return containerd.Folders(self.folder / "containerd")

    @property
    def cgroup(self) -> Cgroup:
        """Of its programs and its pods."""
        return Cgroup(f"{NAME}/{self.name}")

    def start(self) -> None:
        """Start its programs. Raises ProgramFailedError, NotInTimeError."""
        self.cgroup.create()
        self._write_configuration()
        self._start("containerd", "containerd", "--config", self.containerd.configuration)
        until(
            f"containerd of {self.name} serves",
            lambda: self._serves(self.containerd.socket),
            seconds=_START_SECONDS,
        )
        self._start("kubelet", self.programs / "kubelet", *self._kubelet_flags())
        self._start("kube-proxy", self.programs / "kube-proxy", *self._proxy_flags())

    def check(self) -> None:
        """Raise ProgramFailedError if one of its programs has ended."""
        for program in self._started:
            program.check()

    def power_off(self) -> None:
        """End everything on it at once, as a power cut does; `start` boots it again."""
        self.cgroup.kill()
        mounts.unmount_below(self.folder)
        # What a machine keeps in memory is gone: containers, their links and addresses.
        containerd.forget_containers(self.containerd)
        for link in json.loads(run("ip", "-n", namespace(self.name), "-j", "link", "show")):
            if link["ifname"] not in ("lo", "eth0"):
                run("ip", "-n", namespace(self.name), "link", "delete", link["ifname"])
        shutil.rmtree(self.folder / "addresses", ignore_errors=True)

    def stop_programs(self) -> None:
        """End kubelet, kube-proxy and containerd, but no container; `start` starts them again."""
        for name in ("kubelet", "kube-proxy"):
            self._cgroup(name).kill()
        # Not the shims, which hold the containers and were started from there.
        self._cgroup("containerd").kill(program="containerd")

    def freeze(self) -> None:
        """Stop everything on it without its noticing, as a hanging machine does."""
        self.cgroup.freeze()

    def thaw(self) -> None:
        """Let everything on it go on."""
        self.cgroup.thaw()

    # --- configuration ------------------------------------------------------------------------

    def _write_configuration(self) -> None:
        containerd.configure(self.containerd, cni=self.folder / "cni")
        (self.folder / "cni").mkdir(exist_ok=True)
        _write_json(self.folder / "cni" / "10-pods.conflist", self._cni())
        # Pods ask the cluster's DNS only: nothing here has names outside.
        (self.folder / "resolv.conf").write_text("")
        _write_json(self.folder / "kubelet.json", self._kubelet_configuration())

    def _cni(self) -> dict[str, Any]:
        """A routed link a pod: unlike on a bridge, all packets pass kube-proxy's rules."""
        return {
            "cniVersion": "0.4.0",
            "name": NAME,
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.folder / "addresses"),
                        "ranges": [[{"subnet": self.settings.pod_range(self.name)}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }

    def _kubelet_configuration(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            # Only the namespaces of this cluster reach it.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup.path}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{self.containerd.socket}",
            "clusterDNS": [self.settings.dns_address],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self.folder / "resolv.conf"),
            "podLogsDir": str(self.folder / "pod-logs"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "nodeLeaseDurationSeconds": self.settings.node_grace_seconds,
            "nodeStatusUpdateFrequency": "5s",
            # The machine's disk and memory are not the nodes' to judge.
            "evictionHard": {"nodefs.available": "1%", "memory.available": "50Mi"},
            "imageGCHighThresholdPercent": 100,
        }

    def _kubelet_flags(self) -> list[str | Path]:
        return [
            f"--config={self.folder / 'kubelet.json'}",
            f"--kubeconfig={self.identity.kubeconfig(self.name)}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'kubelet-pki'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.settings.node_address(self.name)}",
        ]

    def _proxy_flags(self) -> list[str]:
        return [
            f"--kubeconfig={self.identity.kubeconfig('kube-proxy')}",
            f"--hostname-override={self.name}",
            f"--cluster-cidr={self.settings.all_pods}",
            "--proxy-mode=iptables",
            "--conntrack-max-per-core=0",  # a limit of the machine, which is not ours to set
        ]

    def _serves(self, socket: Path) -> bool:
        self.check()
        return containerd.serves(socket)

    def _cgroup(self, name: str) -> Cgroup:
        return Cgroup(f"{self.cgroup.path}/{name}")

    def _start(self, name: str, *command: str | Path) -> None:
        program = Program(
            name=f"{self.name}/{name}",
            command=command,
            namespace=namespace(self.name),
            cgroup=self._cgroup(name),
            log=self.settings.logs / f"{self.name}-{name}.log",
            # The programs are found by name: runc, shims, plugins, iptables.
            environment={"PATH": f"{_PATH}:{CNI_PLUGINS}"},
        )
        program.start()
        self._started.append(program)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
