"""The cgroup of the cluster: whatever the cluster starts, and their children, are in it.

So what belongs to a cluster is known without names or files with process ids, also after the
harness itself was killed, and a node's programs can be frozen or ended as one.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e2e.cluster.errors import NotOnThisMachineError
from e2e.cluster.waiting import until

ROOT = Path("/sys/fs/cgroup")
FREEZER = ROOT / "freezer"
"""The hierarchy in which membership is looked up; programs are put into this one only."""
_END_SECONDS = 30


def controllers() -> list[Path]:
    """Return the mounted hierarchies of cgroup v1. Raises NotOnThisMachineError without any."""
    if not (FREEZER / "cgroup.procs").exists():
        raise NotOnThisMachineError(
            f"{FREEZER} is not there: the harness works with cgroup v1. "
            "Start the kernel with systemd.unified_cgroup_hierarchy=0."
        )
    found = {path.resolve() for path in ROOT.iterdir() if (path / "cgroup.procs").exists()}
    return sorted(found - {ROOT / "unified"})


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One cgroup by its path below the root of every hierarchy, such as penstock-e2e/node1."""

    path: str

    def create(self) -> None:
        """Make it in every hierarchy, with the parent's CPUs and memory nodes."""
        for controller in controllers():
            folder = controller
            for part in Path(self.path).parts:
                folder /= part
                folder.mkdir(exist_ok=True)
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (folder / name).exists() and not (folder / name).read_text().strip():
                        (folder / name).write_text((folder.parent / name).read_text())

    @property
    def entrance(self) -> Path:
        """The file into which a process writes its id to be in here."""
        return FREEZER / self.path / "cgroup.procs"

    def processes(self) -> list[int]:
        """Return the ids of the processes in here and below."""
        found: list[int] = []
        for folder, _, _ in os.walk(FREEZER / self.path):
            try:
                found += map(int, (Path(folder) / "cgroup.procs").read_text().split())
            except FileNotFoundError:  # a container's cgroup that has just been removed
                continue
        return found

    def freeze(self) -> None:
        """Stop every process in here at once; none of them notices. Raises NotInTimeError."""
        self._set_state("FROZEN")

    def thaw(self) -> None:
        """Let them go on. Raises NotInTimeError."""
        self._set_state("THAWED")

    def _set_state(self, state: str) -> None:
        file = FREEZER / self.path / "freezer.state"

        def reached() -> bool:
            file.write_text(state)
            return file.read_text().strip() == state

        until(f"{self.path} is {state}", reached, seconds=_END_SECONDS)

    def kill(self, *, program: str | None = None) -> None:
        """End every process in here, or those that run `program`, by SIGKILL.

        Raises NotInTimeError if one does not end.
        """
        if not (FREEZER / self.path).exists():
            return
        self.thaw()
        until(
            f"all processes of {self.path} have ended",
            partial(self._sweep, program),
            seconds=_END_SECONDS,
        )

    def _sweep(self, program: str | None) -> bool:
        """Ask again for the processes: those seen may have started others."""
        alive = [p for p in self.processes() if program in (None, _program(p))]
        for process in alive:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not alive

    def remove(self) -> None:
        """Remove it and all below from every hierarchy. It must have no processes."""
        for controller in controllers():
            for folder, _, _ in os.walk(controller / self.path, topdown=False):
                until(f"{folder} is removed", partial(_removed, Path(folder)), seconds=10)


def _program(process: int) -> str | None:
    try:
        return Path(f"/proc/{process}/exe").readlink().name
    except FileNotFoundError:
        return None


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:  # busy while the last process is being reaped
        raise AssertionError(str(error)) from error
    return True
