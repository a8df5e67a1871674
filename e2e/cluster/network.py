"""Network namespaces as machines: one for the control plane, one a node, on one bridge.

    this machine ── bridge ──┬── control plane   API server, DNS
                             ├── node1           its pods behind it, routed
                             └── node2

Nothing is forwarded to any other network. This machine reaches nodes and pods directly, and cluster
IPs through one node's kube-proxy, as a load balancer outside the cluster would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster.process import run
from e2e.cluster.settings import NAME

if TYPE_CHECKING:
    from e2e.cluster.settings import Settings

CONTROL = "control"
_NAMESPACES = Path("/var/run/netns")


def namespace(machine: str) -> str:
    """Return the name of a machine's network namespace."""
    return f"{NAME}-{machine}"


@dataclass(frozen=True, slots=True)
class Network:
    """The machines of a cluster and the links between them."""

    settings: Settings

    def create(self) -> None:
        """Make bridge, namespaces and routes."""
        settings = self.settings
        run("ip", "link", "add", NAME, "type", "bridge")
        run("ip", "address", "add", f"{settings.host_address}/24", "dev", NAME)
        run("ip", "link", "set", NAME, "up")
        self._add_machine(CONTROL, settings.control_address)
        for node in settings.node_names:
            self._add_machine(node, settings.node_address(node))
        for node in settings.node_names:
            self._add_routes_to(node)
        self.enter_services_at(settings.node_names[0])

    def _add_machine(self, machine: str, address: str) -> None:
        inside = namespace(machine)
        run("ip", "netns", "add", inside)
        run("ip", "link", "add", _link(machine), "type", "veth", "peer", "eth0", "netns", inside)
        run("ip", "link", "set", _link(machine), "master", NAME, "up")
        run("ip", "-n", inside, "link", "set", "lo", "up")
        run("ip", "-n", inside, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", inside, "link", "set", "eth0", "up")
        # Packets to cluster IPs need a route before kube-proxy's rules see them.
        run("ip", "-n", inside, "route", "add", "default", "via", self.settings.host_address)
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        run("nsenter", f"--net={_NAMESPACES / inside}", "sh", "-c", forward)

    def _add_routes_to(self, node: str) -> None:
        """Everybody reaches the node's pods through the node."""
        pods, via = self.settings.pod_range(node), self.settings.node_address(node)
        run("ip", "route", "add", pods, "via", via)
        for other in (CONTROL, *self.settings.node_names):
            if other != node:
                run("ip", "-n", namespace(other), "route", "add", pods, "via", via)

    def enter_services_at(self, node: str) -> None:
        """Send this machine's packets to cluster IPs through `node` from now on."""
        via = self.settings.node_address(node)
        run("ip", "route", "replace", self.settings.service_range, "via", via)

    def cut(self, node: str) -> None:
        """Take the node's cable out."""
        run("ip", "link", "set", _link(node), "down")

    def heal(self, node: str) -> None:
        """Put the node's cable in again."""
        run("ip", "link", "set", _link(node), "up")

    @staticmethod
    def remove() -> None:
        """Remove whatever is there of it, of this run or an earlier one. Routes go with links."""
        links = {line.split(":")[1].split("@")[0].strip() for line in _lines("link", "show")}
        for path in _NAMESPACES.glob(f"{NAME}-*") if _NAMESPACES.exists() else ():
            link = _link(path.name.removeprefix(f"{NAME}-"))
            if link in links:
                run("ip", "link", "delete", link)
            run("ip", "netns", "delete", path.name)
        if NAME in links:
            run("ip", "link", "delete", NAME)


def _link(machine: str) -> str:
    """Return the name of the machine's cable on the bridge: an interface has 15 letters at most."""
    return f"pe2e-{machine}"


def _lines(*arguments: str) -> list[str]:
    return run("ip", "-o", *arguments).splitlines()
