"""The state directory of one local service: who owns it, what is wanted, what was seen.

    lock            held by the supervisor as long as it lives (flock); holds its pid
    desired.json    what is wanted; written by commands, read by the supervisor
    status.json     conditions and counts       pods.json   pods with pid and address
    endpoints.json  workers, for the router      hosts.json  names, for workers
    keys/ secrets/  0700, files 0600             logs/       one file a pod, and supervisor.log

Every file is replaced as a whole, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock_operator.errors import AlreadyRunning, StateError
from penstock_operator.local.processes import start_time

if TYPE_CHECKING:
    from collections.abc import Iterator


_LOCK_SECONDS = 0.5
"""How long to try for the lock: commands that look for a supervisor hold it for an instant."""
_WRITE_SECONDS = 1.0


def default_root() -> Path:
    """Return where state directories are: the user's runtime directory, or below home."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "penstock"
    return Path.home() / ".local" / "state" / "penstock"


class StateDir:
    """Paths and files of one service. Raises StateError where the disk does not cooperate."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / name
        self.lock_file = self.path / "lock"
        self.desired_file = self.path / "desired.json"
        self.status_file = self.path / "status.json"
        self.pods_file = self.path / "pods.json"
        self.endpoints_file = self.path / "endpoints.json"
        self.hosts_file = self.path / "hosts.json"
        self.keys = self.path / "keys"
        self.secrets = self.path / "secrets"
        self.logs = self.path / "logs"

    def create(self) -> None:
        """Make the directories, readable for the owner alone."""
        try:
            for directory in (self.path, self.keys, self.secrets, self.logs):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                directory.chmod(0o700)
        except OSError as error:
            raise StateError(
                f"the state directory {self.path} cannot be made: {error}",
                remedy="choose another one with --state-dir",
            ) from error

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the directory. Raises AlreadyRunning while another supervisor does."""
        self.create()
        with self.lock_file.open("a+", encoding="utf-8") as file:
            if not _lock(file.fileno()):
                raise AlreadyRunning(
                    f"the service {self.name} runs already (pid {self.owner()})",
                    remedy="see it with `penstock get`, change it with `penstock apply -f FILE`, "
                    f"stop it with `penstock down --name {self.name}`",
                )
            file.truncate(0)
            file.write(f"{os.getpid()} {start_time(os.getpid())}")
            file.flush()
            yield
            file.truncate(0)

    def owner(self) -> int | None:
        """Return the pid of the living supervisor, None if there is none."""
        try:
            with self.lock_file.open("r", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return self._read_pid(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.lock_file} cannot be read: {error}") from error
        return None

    def _read_pid(self, descriptor: int) -> int | None:
        """Read the pid. The owner writes it just after it has taken the lock."""
        deadline = time.monotonic() + _WRITE_SECONDS
        while time.monotonic() < deadline:
            pid, _, started = os.pread(descriptor, 64, 0).partition(b" ")
            if pid.isdigit() and started == str(start_time(int(pid))).encode():
                return int(pid)
            time.sleep(0.01)
        return None  # it has just ended, or was a command that only looked

    def log_file(self, pod: str) -> Path:
        """Return the log of a pod, named as in `penstock ps`."""
        return self.logs / f"{pod}.log"

    def read(self, path: Path) -> Any:
        """Return the JSON in `path`, None if there is no such file."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StateError(f"{path} cannot be read: {error}") from error

    def write(self, path: Path, value: object) -> None:
        """Replace `path` by `value` as JSON, in one step."""
        write_private(path, json.dumps(value, indent=1))

    @contextlib.contextmanager
    def changing_desired(self) -> Iterator[None]:
        """Keep other commands from changing what is wanted at the same time."""
        with (self.path / "desired.lock").open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def write_private(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, readable for the owner alone. Raises StateError."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error}") from error


def services(root: Path) -> list[StateDir]:
    """Return the services that have a state directory under `root`, running or not."""
    if not root.is_dir():
        return []
    found = [StateDir(root, entry.name) for entry in sorted(root.iterdir()) if entry.is_dir()]
    return [state for state in found if state.lock_file.exists()]
