"""The whole cluster: up, down, and what tests do to its nodes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import containerd, images, mounts
from e2e.cluster.cgroups import Cgroup
from e2e.cluster.control import ControlPlane
from e2e.cluster.errors import ClusterError, ProgramFailedError
from e2e.cluster.identity import Identity
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.network import Network
from e2e.cluster.node import Node
from e2e.cluster.settings import NAME, Settings
from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from e2e.cluster.oci import Image
    from e2e.cluster.programs import Programs

_READY_SECONDS = 180
_CONTAINER_LOG_LINKS = Path("/var/log/containers")
_CNI_RESULTS = Path("/var/lib/cni/results")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster by its settings, whether it runs or not."""

    settings: Settings
    programs: Programs

    @property
    def kubectl(self) -> Kubectl:
        """kubectl as administrator."""
        return Kubectl(self.programs / "kubectl", self.settings.kubeconfig)

    @property
    def network(self) -> Network:
        """Links between the machines."""
        return Network(self.settings)

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes by name."""
        identity = Identity(self.settings)
        return {
            name: Node(name, self.settings, self.programs, identity)
            for name in self.settings.node_names
        }

    @property
    def control(self) -> ControlPlane:
        """The control plane."""
        return ControlPlane(self.settings, self.programs, Identity(self.settings), self.kubectl)

    def up(self, wanted: Sequence[Image]) -> None:
        """Start everything from nothing, with these images beside the pause image.

        What an earlier run left is removed first. If anything fails, so is what was started.

        Raises:
            ClusterError: a part did not start; the message has the end of its log.
        """
        images.prepare([images.pause_image(self.programs / "pause"), *wanted])
        remove(self.settings)
        shutil.rmtree(self.settings.logs, ignore_errors=True)
        self.settings.folder.mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            remove(self.settings)
            raise

    def up_to_date(self, wanted: Sequence[Image]) -> None:
        """Start everything, or load these images into what runs. Raises as `up` does."""
        if self.is_up():
            self.load(wanted)
        else:
            self.up(wanted)

    def _start(self) -> None:
        Identity(self.settings).create()
        self.network.create()
        self.control.start()
        for node in self.nodes.values():
            images.copy_to(node.containerd)
            node.start()
        for name in self.settings.node_names:
            self.wait_for_node(name)
        text = json.dumps(dataclasses.asdict(self.settings), default=str, indent=1)
        _marker(self.settings).write_text(text, encoding="utf-8")

    def wait_for_node(self, name: str, *, ready: bool = True, seconds: float | None = None) -> None:
        """Return when a node is Ready and open to pods, or neither.

        Raises NotInTimeError.
        """

        def look() -> bool:
            try:
                node = self.kubectl.get("node", name)
            except ProgramFailedError as error:
                raise AssertionError(str(error)) from error
            conditions = {c["type"]: c for c in node["status"]["conditions"]}
            is_ready = conditions["Ready"]["status"] == "True"
            assert is_ready == ready, conditions["Ready"]["message"]
            taints = [taint["key"] for taint in node["spec"].get("taints", [])]
            assert ready != any(map(_is_about_readiness, taints)), f"its taints are {taints}"
            return True

        what = f"{name} is {'Ready' if ready else 'not Ready'}"
        until(what, look, seconds=seconds or _READY_SECONDS, every=0.5)

    def load(self, wanted: Sequence[Image]) -> None:
        """Give running nodes what they lack of these images, and the next cluster too."""
        images.prepare([images.pause_image(self.programs / "pause"), *wanted])
        for node in self.nodes.values():
            images.load(node.containerd, wanted)

    def is_up(self) -> bool:
        """Return whether a cluster with these settings runs and its API server serves."""
        if not _marker(self.settings).exists():
            return False
        saved = json.loads(_marker(self.settings).read_text(encoding="utf-8"))
        if saved != json.loads(json.dumps(dataclasses.asdict(self.settings), default=str)):
            return False
        done = self.kubectl("get", "--raw", "/readyz", check=False, seconds=20)
        return done.returncode == 0


def _is_about_readiness(taint: str) -> bool:
    return taint in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def remove(settings: Settings) -> None:
    """End and remove whatever there is of a cluster, of this run or an earlier one.

    Processes are those in the cluster's cgroup. Idempotent. Raises ClusterError.
    """
    group = Cgroup(NAME)
    group.kill()
    mounts.unmount_below(settings.folder)
    for base in settings.folder.glob("*/containerd"):
        containerd.forget_containers(containerd.Folders(base))
    Network.remove()
    group.remove()
    _remove_traces(settings.folder)
    if mounts.below(settings.folder):
        raise ClusterError(f"something is mounted below {settings.folder} again: unmount it")
    for folder in (settings.folder, settings.models):
        if folder.exists():
            shutil.rmtree(folder)


def _remove_traces(folder: Path) -> None:
    """Remove what kubelets and CNI put into folders that cannot be chosen."""
    for link in _CONTAINER_LOG_LINKS.glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(folder):
            link.unlink()
    for result in _CNI_RESULTS.glob(f"{NAME}-*"):
        result.unlink()


def _marker(settings: Settings) -> Path:
    """The file that says that the cluster came up whole, with which settings."""
    return settings.folder / "settings.json"
