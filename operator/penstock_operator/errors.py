"""Everything the control plane raises for a person to read.

    PenstockError
    ├── ManifestError        the manifest is refused; trying again does not help
    ├── StateError           the state directory cannot be used
    ├── AlreadyRunning       a service of this name runs
    ├── NotRunning           no such service runs
    ├── PortInUse            another program holds the API's port
    ├── NoLoopbackNetwork    no free range of loopback addresses
    ├── ServiceFailed        the service started but did not do what was asked of it
    ├── SettingsError        the operator's settings are impossible
    ├── LeaseLost            another operator may lead: this one must not write any more
    └── ApiError             Kubernetes did not do what was asked of it
        ├── ApiUnavailable       no answer, or one that asks to try again later
        ├── ApiConflict          the object exists already, or is not the one that was meant
        ├── ApiMissing           there is no such object or resource
        └── ApiRefused           it will not be done, however often it is tried

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


class SettingsError(PenstockError):
    """A setting is impossible; the message names the flag."""

    exit_code = 2


class LeaseLost(PenstockError):  # noqa: N818 - it names the state
    """The lease could not be renewed in time, so another operator may lead."""


class ApiError(PenstockError):
    """Kubernetes' API did not do what was asked of it.

    `status` is the HTTP status, 0 if there was no answer.
    """

    def __init__(self, cause: str, *, status: int = 0, remedy: str = "") -> None:
        super().__init__(cause, remedy=remedy)
        self.status = status


class ApiUnavailable(ApiError):  # noqa: N818 - it names the state
    """No answer, or one that asks to try again later (429, 5xx)."""


class ApiConflict(ApiError):  # noqa: N818 - it names the state
    """The object exists already, changed meanwhile, or is another one of the same name (409)."""


class ApiMissing(ApiError):  # noqa: N818 - it names the state
    """There is no such object, or the API server does not know the resource (404)."""


class ApiRefused(ApiError):  # noqa: N818 - it names the state
    """The request is wrong or not allowed: the same again would be refused again (other 4xx)."""
