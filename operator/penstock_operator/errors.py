"""Everything the control plane raises for a person to read.

    PenstockError
    ├── ManifestError        the manifest is refused; trying again does not help
    ├── StateError           the state directory cannot be used
    ├── AlreadyRunning       a service of this name runs
    ├── NotRunning           no such service runs
    ├── PortInUse            another program holds the API's port
    ├── NoLoopbackNetwork    no free range of loopback addresses
    └── ServiceFailed        the service started but did not do what was asked of it

The message names the cause, `remedy` what to do about it. The command line prints both, without a
traceback, and exits with `exit_code`.
"""

from __future__ import annotations

from dataclasses import dataclass


class PenstockError(Exception):
    """Base of all: a cause, and a remedy where one is known."""

    exit_code = 1

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        super().__init__(cause)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a manifest: where, what, and its line in the text (0: unknown)."""

    path: str
    reason: str
    line: int = 0

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.reason}" if self.path else f"{where}{self.reason}"


class ManifestError(PenstockError):
    """The manifest is refused. `problems` holds every reason, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[Problem], *, source: str = "") -> None:
        self.problems = problems
        head = f"{source or 'the manifest'} is refused"
        super().__init__("\n  ".join([f"{head}:", *map(str, problems)]))


class StateError(PenstockError):
    """The state directory cannot be read, written or locked."""


class AlreadyRunning(PenstockError):  # noqa: N818 - it names the state
    """A service of this name runs already."""


class NotRunning(PenstockError):  # noqa: N818 - it names the state
    """No service of this name runs."""

    exit_code = 3


class PortInUse(PenstockError):  # noqa: N818 - it names the state
    """Another program listens where the API should."""


class NoLoopbackNetwork(PenstockError):  # noqa: N818 - it names the state
    """No range of loopback addresses is free, or this system has only 127.0.0.1."""


class ServiceFailed(PenstockError):  # noqa: N818 - it names the state
    """The service runs but did not do what was asked of it in time."""
