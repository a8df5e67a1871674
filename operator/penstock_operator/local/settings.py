"""Settings of the local executor; each with its unit, default and why that default."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


_MODULES = {
    "penstock-worker": "penstock_runtime.worker.main",
    "penstock-router": "penstock_router.main",
}


def default_programs() -> dict[str, tuple[str, ...]]:
    """Return what runs for a container's command: our own programs, of this very environment.

    That is the script beside the interpreter, or its entry point where none was installed.
    """
    programs: dict[str, tuple[str, ...]] = {}
    for command, module in _MODULES.items():
        script = Path(sys.executable).with_name(command)
        entry = (sys.executable, "-c", f"from {module} import main; main()")
        programs[command] = (str(script),) if script.exists() else entry
    return programs


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSettings:
    """How objects are run as processes. Times are in seconds."""

    host: str = "127.0.0.1"
    """Address of the API. Loopback, so that nothing is open to the network unasked."""
    port: int | None = None
    """TCP port of the API; None: the manifest's router.port."""
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=default_programs)
    """What to run for a container's command."""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files that stand for Secrets of the manifest, by the Secret's name."""
    probe_seconds: float = 0.5
    """Longest time between probes of a pod that is not ready: a person waits for it."""
    tick_seconds: float = 0.25
    """How often the wanted state is looked at when nothing else wakes the loop."""
    backoff_first: float = 0.5
    """Wait before the first restart; each further wait is twice as long."""
    backoff_most: float = 30.0
    """Longest wait: a person who mends the cause should not wait minutes for the next try."""
    stable_seconds: float = 60.0
    """After running so long a pod starts again with the first wait."""
    shutdown_grace: float = 10.0
    """How long everything may drain when the whole service ends. Shorter than a rollout's grace:
    a person has pressed Ctrl-C and waits."""
    kill_seconds: float = 5.0
    """How long a killed process may take to disappear before it is reported."""
    log_bytes: int = 10 * 1024 * 1024
    """A log file that has grown so large is set aside as NAME.log.1, and that one is deleted."""
