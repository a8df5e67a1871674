"""The cluster's settings: each with its unit, its default, and why that default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "penstock-e2e"
"""What is built once a machine. The run folder is in here too: images reach the nodes as hard
links, which need one file system."""
NAME = "penstock-e2e"
"""Of the cgroup and the bridge; namespaces begin with it. One cluster a machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that can be chosen about a cluster."""

    nodes: int = 2
    """Nodes. Default 2: the fewest on which things can be apart. At most 9."""
    folder: Path = CACHE / "cluster"
    """Run folder: configuration, state, logs. Removed with the cluster, except for the logs."""
    logs: Path = CACHE / "logs"
    """Logs of every component of the latest cluster. Emptied when the next one starts."""
    models: Path = Path("/var/lib/penstock-e2e/models")
    """Model directories of tests, the same path on every node. Not below anybody's home, which the
    pods' user may not enter. Removed with the cluster."""
    network: str = "172.30.0"
    """First three numbers of the /24 that nodes and control plane share. The machine itself has
    .1, the control plane .2, node i .10+i. The default is private and seldom used."""
    pods: str = "10.244"
    """First two numbers of the /16 of all pods; node i has the /24 that ends in i."""
    services: str = "10.96"
    """First two numbers of the /16 of cluster IPs; the third and fourth of DNS are 0.10."""
    node_grace_seconds: int = 20
    """Silence after which a node counts as lost. Default 20 instead of Kubernetes' 50, so that
    tests of node loss are short; well above the 5 s at which kubelets here renew their lease."""
    toleration_seconds: int = 10
    """How long pods stay on a lost node. Default 10 instead of Kubernetes' 300, likewise."""

    def __post_init__(self) -> None:
        """Refuse impossible values. Raises ValueError."""
        if not 1 <= self.nodes <= 9:
            raise ValueError(f"--nodes {self.nodes} is not between 1 and 9")

    @property
    def node_names(self) -> tuple[str, ...]:
        """node1, node2, ..."""
        return tuple(f"node{i}" for i in range(1, self.nodes + 1))

    @property
    def host_address(self) -> str:
        """Of this machine on the bridge."""
        return f"{self.network}.1"

    @property
    def control_address(self) -> str:
        """Of the API server and of DNS."""
        return f"{self.network}.2"

    @property
    def api_url(self) -> str:
        """Of the API server."""
        return f"https://{self.control_address}:6443"

    def node_address(self, node: str) -> str:
        """Return the address of a node."""
        return f"{self.network}.{10 + self._number(node)}"

    def pod_range(self, node: str) -> str:
        """Return the /24 of a node's pods."""
        return f"{self.pods}.{self._number(node)}.0/24"

    @property
    def all_pods(self) -> str:
        """The /16 of all pods."""
        return f"{self.pods}.0.0/16"

    @property
    def service_range(self) -> str:
        """The /16 of cluster IPs."""
        return f"{self.services}.0.0/16"

    @property
    def dns_address(self) -> str:
        """The cluster IP of DNS."""
        return f"{self.services}.0.10"

    @property
    def kubeconfig(self) -> Path:
        """Of the administrator."""
        return self.folder / "admin.kubeconfig"

    def _number(self, node: str) -> int:
        return self.node_names.index(node) + 1
