"""The operator's settings: each with its unit, its default, and why that default."""

from __future__ import annotations

import argparse
import os
import socket
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from penstock_operator.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that can be chosen about an operator.

    The command line is made from these fields: `lease_name` is `--lease-name`. A flag given twice
    counts with its last value; lists are separated by commas.
    """

    namespaces: Annotated[
        tuple[str, ...],
        "Namespaces to serve, separated by commas. None by default: all of the cluster.",
    ] = ()
    kubeconfig: Annotated[
        Path | None,
        (
            "File that says where the API server is. By default the pod's service account, and "
            "outside of a cluster the file that kubectl reads."
        ),
    ] = None
    http: Annotated[
        str,
        (
            "HOST:PORT of /healthz, /readyz and /metrics. All addresses by default: the kubelet "
            "and Prometheus ask from outside of the pod, and nothing there is secret."
        ),
    ] = "0.0.0.0:8080"
    log_format: Annotated[
        str,
        "json or text. json by default: one object a line, which log systems read.",
    ] = "json"
    log_level: Annotated[
        str,
        "debug, info, warning or error.",
    ] = "info"
    lease_namespace: Annotated[
        str,
        "Namespace of the lease. By default the pod's own, outside of a cluster `default`.",
    ] = ""
    lease_name: Annotated[
        str,
        "Name of the lease. Operators with the same one never write at the same time.",
    ] = "penstock-operator"
    lease_seconds: Annotated[
        float,
        (
            "After so long without a sign of the leader another operator takes over. 15 s outlives "
            "a slow API server, and nobody misses an operator for 15 s: it is not in the data path."
        ),
    ] = 15.0
    renew_deadline_seconds: Annotated[
        float,
        "After so long without a renewal the leader stops to write. It must be below the former.",
    ] = 10.0
    lease_retry_seconds: Annotated[
        float,
        "Time between attempts at the lease. 2 s leave room for four before the deadline.",
    ] = 2.0
    workers: Annotated[
        int,
        "Services that are reconciled at once. 8 keep one core busy; more only wait for it.",
    ] = 8
    reconcile_seconds: Annotated[
        float,
        (
            "Longest reconcile of one service. 120 s are a hundred times what one takes; /healthz "
            "fails when a service has waited for twice as long."
        ),
    ] = 120.0
    resync_seconds: Annotated[
        float,
        (
            "Time between two complete comparisons with the API server. 300 s: watches tell of "
            "changes at once, this only finds what they have missed."
        ),
    ] = 300.0
    poll_seconds: Annotated[
        float,
        "Longest answer of a worker or router to a question about its state.",
    ] = 1.5

    def __post_init__(self) -> None:
        """Refuse impossible values. Raises SettingsError naming the flag."""
        for name in _SECONDS:
            if not getattr(self, name) > 0:
                raise SettingsError(f"{_flag(name)} must be more than 0 seconds")
        if self.renew_deadline_seconds >= self.lease_seconds:
            raise SettingsError(
                f"--renew-deadline-seconds {self.renew_deadline_seconds:g} must be below "
                f"--lease-seconds {self.lease_seconds:g}: a leader has to stop before the next one "
                "begins"
            )
        if self.lease_retry_seconds >= self.renew_deadline_seconds:
            raise SettingsError("--lease-retry-seconds must be below --renew-deadline-seconds")
        if self.workers < 1:
            raise SettingsError("--workers must be at least 1")
        if self.log_format not in {"json", "text"}:
            raise SettingsError(f"--log-format {self.log_format!r} is neither json nor text")
        if self.log_level not in {"debug", "info", "warning", "error"}:
            raise SettingsError(f"--log-level {self.log_level!r} is not a level")
        self.http_address()

    def http_address(self) -> tuple[str, int]:
        """Return host and port of --http."""
        host, separator, port = self.http.rpartition(":")
        if not separator or not port.isdigit() or int(port) > 65535:
            raise SettingsError(f"--http {self.http!r} is not HOST:PORT")
        return host.strip("[]"), int(port)

    def own_namespace(self) -> str:
        """Return the namespace of the lease."""
        if self.lease_namespace:
            return self.lease_namespace
        try:
            return _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
        except OSError:
            return "default"


_SECONDS = (
    "lease_seconds",
    "renew_deadline_seconds",
    "lease_retry_seconds",
    "reconcile_seconds",
    "resync_seconds",
    "poll_seconds",
)


def identity() -> str:
    """Return a name of this process that no other and no earlier process has."""
    return f"{socket.gethostname()}_{os.getpid()}_{os.urandom(4).hex()}"


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line (default: this process's).

    Raises:
        SettingsError: a value is impossible.
        SystemExit: a flag is unknown or malformed, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="penstock-operator",
        description="Runs InferenceServices on Kubernetes.",
        allow_abbrev=False,
    )
    hints = get_type_hints(Settings, include_extras=True)
    for each in fields(Settings):
        hint, text = get_args(hints[each.name])
        _add_flag(parser, each, hint, text)
    return Settings(**vars(parser.parse_args(arguments)))


def _add_flag(parser: argparse.ArgumentParser, each: Field[Any], hint: Any, text: str) -> None:
    assert each.default is not MISSING, "an operator starts without any flag"
    if each.default not in (None, "", ()):
        text += f" Default: {each.default}."
    kinds: dict[Any, Any] = {int: int, float: float, Path | None: Path, tuple[str, ...]: _names}
    kind = kinds.get(hint, str)
    parser.add_argument(
        _flag(each.name), type=kind, default=each.default, help=text.replace("%", "%%")
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
