"""What commands do: talk to the supervisor of a local service through its state directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from penstock_operator.api import Status
from penstock_operator.checks import model_problems
from penstock_operator.errors import (
    ManifestError,
    NotRunning,
    PenstockError,
    Problem,
    ServiceFailed,
    StateError,
)
from penstock_operator.loader import dump_manifest, load_manifest, parse_manifest
from penstock_operator.local.desired import read_desired, write_desired
from penstock_operator.local.state import StateDir, services

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_operator.api import InferenceService
    from penstock_operator.labels import Role

_HERE = Path(__file__).parent
DEMO_MODEL = _HERE / "demo"
_POLL_SECONDS = 0.1
_RUNNABLE_SCHEMES = ("file", "hf", "s3")


# --- manifests --------------------------------------------------------------------------------


def read_manifest(path: Path | None) -> InferenceService:
    """Return the service in a file, "-" for standard input, None for the built-in demo.

    Raises ManifestError.
    """
    if path is None:
        text = (_HERE / "demo_service.yaml").read_text(encoding="utf-8")
        return load_manifest(
            text.replace("@DEMO@", DEMO_MODEL.as_uri()), source="the built-in demo"
        )
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            [Problem("", f"it cannot be read: {error}")], source=str(path)
        ) from error
    return load_manifest(text, source=str(path))


def renamed(service: InferenceService, name: str | None) -> InferenceService:
    """Return the service under another name. Raises ManifestError if it is not a valid one."""
    if name is None:
        return service
    raw = dump_manifest(service)
    raw["metadata"]["name"] = name
    return parse_manifest(raw, source="--name")


def check_runs_here(service: InferenceService) -> None:
    """Raise ManifestError unless this machine can run the service."""
    problems: list[Problem] = []
    uri = service.spec.model.uri
    if service.spec.model.scheme not in _RUNNABLE_SCHEMES:
        reason = f"{uri} can be read in a cluster only; on one machine use file://, hf:// or s3://"
        problems.append(Problem("spec.model.uri", reason))
    elif service.spec.model.scheme == "file":
        problems += _directory_problems(service, Path(unquote(urlsplit(uri).path)))
    if problems:
        raise ManifestError(problems, source=f"the manifest of {service.name}")


def _directory_problems(service: InferenceService, directory: Path) -> list[Problem]:
    config_file = directory / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"{directory} is no model directory: {config_file.name} cannot be read: {error}"
        return [Problem("spec.model.uri", reason)]
    if not isinstance(config, dict):
        return [Problem("spec.model.uri", f"{config_file} is not a JSON object")]
    return model_problems(service, config)


# --- the running service ----------------------------------------------------------------------


def running(root: Path) -> list[StateDir]:
    """Return the services that run."""
    return [state for state in services(root) if state.owner() is not None]


def find(root: Path, name: str | None) -> StateDir:
    """Return the service called `name`, or the only one that runs. Raises NotRunning."""
    found = running(root)
    if name is not None:
        found = [state for state in found if state.name == name]
    if len(found) == 1:
        return found[0]
    if not found:
        which = f"no service {name} runs" if name else "no service runs"
        raise NotRunning(f"{which} here ({root})", remedy="start one with `penstock up`")
    names = ", ".join(state.name for state in found)
    raise NotRunning(f"several services run: {names}", remedy="say which one with --name")


def find_with_logs(root: Path, name: str | None) -> StateDir:
    """Return a running service, or the only one that ever ran here. Raises NotRunning."""
    if running(root) or name is None:
        known = [state for state in services(root) if state.logs.is_dir()]
        if not running(root) and len(known) == 1:
            return known[0]
        return find(root, name)
    state = StateDir(root, name)
    return state if state.logs.is_dir() else find(root, name)


def status_of(state: StateDir) -> Status | None:
    """Return what the supervisor saw last, None before its first look."""
    raw = state.read(state.status_file)
    try:
        return None if raw is None else Status.model_validate(raw)
    except ValueError as error:
        raise StateError(
            f"{state.status_file} was not written by this release: {error}",
            remedy=f"stop the service with `penstock down --name {state.name}` and start it again",
        ) from error


def pods_of(state: StateDir) -> list[dict[str, Any]]:
    """Return the pods as `describe_pod` gives them."""
    pods = state.read(state.pods_file)
    return pods if isinstance(pods, list) else []


def apply(state: StateDir, service: InferenceService) -> bool:
    """Change what is wanted of a running service; return whether anything differs."""
    with state.changing_desired():
        before = read_desired(state)
        after = before.apply(service)
        if (after.manifest, after.scaled) == (before.manifest, before.scaled):
            return False
        write_desired(state, after)
    return True


def scale(state: StateDir, role: Role, replicas: int) -> None:
    """Change the replicas of a role. Raises ManifestError if it cannot have so many."""
    with state.changing_desired():
        write_desired(state, read_desired(state).scale(role, replicas))


def down(state: StateDir, *, limit: float, now: bool) -> None:
    """End a service and wait until nothing of it is left. Raises ServiceFailed after `limit`."""
    pid = state.owner()
    if pid is None:
        raise NotRunning(f"the service {state.name} does not run", remedy="nothing needs stopping")
    deadline = time.monotonic() + limit
    os.kill(pid, signal.SIGTERM)
    if now:
        time.sleep(_POLL_SECONDS)
        if state.owner() == pid:
            os.kill(pid, signal.SIGTERM)
    while state.owner() == pid:
        if time.monotonic() > deadline:
            raise ServiceFailed(
                f"{state.name} (pid {pid}) did not end within {limit:.0f} s",
                remedy=f"end it at once with `penstock down --name {state.name} --now`",
            )
        time.sleep(_POLL_SECONDS)


def detach(
    state: StateDir, service: InferenceService, options: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start `penstock up` with `options` in the background, its output in supervisor.log.

    Raises AlreadyRunning.
    """
    with state.owned():
        manifest = state.path / "manifest.json"
        state.write(manifest, dump_manifest(service))
        state.status_file.unlink(missing_ok=True)
        state.log_file("supervisor").write_bytes(b"")
    with state.log_file("supervisor").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "penstock_operator.cli", "up", "-f", str(manifest), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_ready(state: StateDir, process: subprocess.Popen[bytes], *, limit: float) -> Status:
    """Wait until a detached service is Ready. Raises ServiceFailed when it ends, or in time."""
    deadline = time.monotonic() + limit
    reason = "it has not been seen yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _ended(state, process.returncode)
        status = status_of(state)
        if status is not None:
            ready = status.condition("Ready")
            if ready.status == "True":
                return status
            reason = f"{ready.reason}: {ready.message}"
        time.sleep(_POLL_SECONDS)
    raise ServiceFailed(
        f"{state.name} is not ready after {limit:.0f} s: {reason}",
        remedy="it goes on trying; look at `penstock logs decode` and `penstock describe`",
    )


def _ended(state: StateDir, code: int) -> PenstockError:
    lines = state.log_file("supervisor").read_text(encoding="utf-8", errors="replace").splitlines()
    last = "\n  ".join(lines[-5:])
    return ServiceFailed(
        f"the supervisor of {state.name} ended with code {code}:\n  {last}",
        remedy=f"all of its output is in {state.log_file('supervisor')}",
    )
