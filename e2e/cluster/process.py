"""Programs that the cluster consists of: each in its network namespace and its cgroup."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e2e.cluster.errors import ProgramFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from e2e.cluster.cgroups import Cgroup

# The shell puts itself where the program has to be before it becomes the program.
_ENTER = 'echo $$ > "$1"; shift; exec "$@"'


def run(*command: str | Path, stdin: str | None = None, seconds: float = 60) -> str:
    """Run a command that ends and return what it printed.

    Raises:
        ProgramFailedError: it failed; the message has what it wrote.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramFailedError(f"{' '.join(words)}: not done after {seconds:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ProgramFailedError(f"{' '.join(words)}: exit {done.returncode}: {said}")
    return done.stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What to start, and where."""

    name: str
    command: Sequence[str | Path]
    namespace: str | None
    """Network namespace. None: the machine's own."""
    cgroup: Cgroup
    log: Path
    environment: Mapping[str, str]
    """Its whole environment."""

    def start(self) -> None:
        """Start it; it outlives this process, and is known by its cgroup from then on."""
        self.cgroup.create()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words: list[str | Path] = ["sh", "-c", _ENTER, "sh", self.cgroup.entrance]
        words += ["setsid", "--fork"]
        if self.namespace is not None:
            # Not `ip netns exec`, which mounts another /sys without the cgroups.
            words += ["nsenter", f"--net=/var/run/netns/{self.namespace}", "--"]
        words += self.command
        with self.log.open("ab") as log:
            subprocess.run(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                check=True,
            )

    def check(self) -> None:
        """Raise ProgramFailedError with the end of its log if it has ended."""
        if not self.cgroup.processes():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise ProgramFailedError(f"{self.name} has ended; see {self.log}:\n" + "\n".join(lines))
