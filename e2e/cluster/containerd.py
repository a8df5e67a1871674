"""containerd: its folders, its configuration, and the images in it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from e2e.cluster.errors import ProgramFailedError
from e2e.cluster.process import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAUSE_IMAGE = "docker.io/penstock-e2e/pause:1"
_IMPORT_SECONDS = 900
_CTR = ("ctr", "--namespace", "k8s.io", "--address")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where one containerd keeps things."""

    base: Path

    @property
    def root(self) -> Path:
        """Images and snapshots; they outlive a reboot."""
        return self.base / "root"

    @property
    def state(self) -> Path:
        """Running containers; they do not."""
        return self.base / "state"

    @property
    def socket(self) -> Path:
        """Where it serves."""
        return self.base / "containerd.sock"

    @property
    def configuration(self) -> Path:
        """Its file."""
        return self.base / "config.toml"

    @property
    def registries(self) -> Path:
        """Where it reads which registry to ask."""
        return self.base / "registries"


def configure(folders: Folders, *, cni: Path) -> None:
    """Write the configuration of a containerd whose pods get their network as `cni` says."""
    default = folders.registries / "_default"
    default.mkdir(parents=True, exist_ok=True)
    # No registry is ever asked: what is not there fails at once.
    (default / "hosts.toml").write_text('server = "http://127.0.0.1:1"\n', encoding="utf-8")
    folders.configuration.write_text(
        f"""version = 2
root = "{folders.root}"
state = "{folders.state}"
[grpc]
  address = "{folders.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE the score cannot be lowered, and runc would fail to.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{folders.registries}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
""",
        encoding="utf-8",
    )


def serves(path: Path) -> bool:
    """Return whether something accepts connections at this socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def load(folders: Folders, write: Callable[[IO[bytes]], None]) -> None:
    """Import the OCI archive that `write` writes, and unpack its images.

    Raises ProgramFailedError.
    """
    command = [*_CTR, str(folders.socket), "images", "import", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as ctr:
        assert ctr.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it says then tells more
            write(ctr.stdin)
        said, _ = ctr.communicate(timeout=_IMPORT_SECONDS)
    if ctr.returncode:
        raise ProgramFailedError(f"{' '.join(command)}: {said.decode(errors='replace')}")


def images(folders: Folders) -> dict[str, str]:
    """Return the images by name, with the digests of their manifests."""
    lines = _ctr(folders, "images", "list").splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines}


def blobs(folders: Folders) -> set[str]:
    """Return the digests of all blobs."""
    return set(_ctr(folders, "content", "list", "--quiet").split())


def blob(folders: Folders, digest: str) -> Path:
    """Return the file of a blob."""
    return folders.root / "io.containerd.content.v1.content" / "blobs" / digest.replace(":", "/")


def tag(folders: Folders, name: str, other: str) -> None:
    """Give an image another name too."""
    _ctr(folders, "images", "tag", "--force", name, other)


def remove_image(folders: Folders, name: str) -> None:
    """Forget an image, and what only it needs."""
    _ctr(folders, "images", "remove", "--sync", name)


def forget_containers(folders: Folders) -> None:
    """Remove what its containers left: nothing of it may be mounted or running any more."""
    for address in _shim_sockets(folders):
        with contextlib.suppress(FileNotFoundError):
            address.unlink()
    shutil.rmtree(folders.state, ignore_errors=True)


def _shim_sockets(folders: Folders) -> Iterator[Path]:
    """Sockets of the shims are outside the state folder; their addresses are in it."""
    for file in folders.state.glob("io.containerd.runtime.v2.task/*/*/address"):
        yield Path(file.read_text(encoding="utf-8").strip().removeprefix("unix://"))


def _ctr(folders: Folders, *arguments: str) -> str:
    return run(*_CTR, str(folders.socket), *arguments)
