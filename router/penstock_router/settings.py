"""The router's settings: each with its unit, its default, and why that default."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    get_args,
    get_type_hints,
)

from penstock_router.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that can be chosen about a router.

    The command line is made from these fields: `max_queue` is `--max-queue`. A flag given twice
    counts with its last value, so that a launcher can append what it must override; `--wake` is a
    list, and each counts.
    """

    model: Annotated[
        str,
        (
            "URI of the model, file:///DIRECTORY or hf://ORG/NAME[@REVISION]. Only the "
            "configuration, the tokenizer and the chat template are read from it, never the "
            "weights."
        ),
    ]
    served_model_name: Annotated[
        str,
        "Name under which clients ask for the model.",
    ]
    discovery: Annotated[
        str,
        (
            "Where the workers are: file:PATH of a JSON list that is watched, or "
            "kubernetes:NAMESPACE/LABEL=VALUE of pods."
        ),
    ]
    keys: Annotated[
        Path,
        "Directory of the service's CURVE key pair.",
    ]
    kubernetes_api: Annotated[
        str | None,
        (
            "URL of the Kubernetes API. By default that of the cluster in which the router runs, "
            "as Kubernetes tells its pods in KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT."
        ),
    ] = None
    kubernetes_credentials: Annotated[
        Path,
        "Directory with the token and ca.crt for it. By default where Kubernetes mounts them.",
    ] = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    wake: Annotated[
        tuple[str, ...],
        (
            "ROLE=SCALER: a role, decode or prefill, that may be scaled to zero, and the name of "
            "the RoleScaler by which a request wakes it. May be given for each role; none by "
            "default."
        ),
    ] = ()
    wake_seconds: Annotated[
        float,
        (
            "How long a request is held for a role that wakes, before 503. 600 s leave a large "
            "model time to be scheduled, downloaded and loaded."
        ),
    ] = 600.0
    name: Annotated[
        str,
        "This router's name, told to the workers.",
    ] = "router"
    revision: Annotated[
        str,
        "Revision of the service, told to the workers.",
    ] = ""
    host: Annotated[
        str,
        (
            "Address to listen on. The loopback address by default, so that nothing is exposed "
            "that nobody asked to expose."
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        "TCP port of the API.",
    ] = 8000
    fd: Annotated[
        int | None,
        (
            "File descriptor of an inherited listening socket to serve too. A launcher that keeps "
            "the API's address bound while routers come and go passes one; none by default."
        ),
    ] = None
    require_prefill: Annotated[
        bool,
        (
            "Send prompts to decode workers with a prefill group, and be ready only when there is "
            "one. Without it, decode workers prefill for themselves whenever there is no group."
        ),
    ] = False
    group_wait_seconds: Annotated[
        float,
        (
            "With --require-prefill, after so long without any prefill group requests are sent to "
            "decode workers alone: slower, but not lost. 10 s is about a stage's restart."
        ),
    ] = 10.0
    api_key_file: Annotated[
        Path | None,
        (
            "File of bearer keys, one a line; read again when it changes. None by default: the "
            "API is open, which is right on the loopback address only."
        ),
    ] = None
    hosts_file: Annotated[
        Path | None,
        "JSON object of host names and addresses, for one machine without DNS.",
    ] = None
    cache_dir: Annotated[
        Path | None,
        (
            "Where hf:// models are kept. The hub library's own cache by default, so that a model "
            "that is there already is not loaded twice."
        ),
    ] = None
    hf_token_file: Annotated[
        Path | None,
        "File with the hub's access token.",
    ] = None
    hf_endpoint: Annotated[
        str | None,
        "URL of the hub, or of a mirror of it.",
    ] = None
    max_queue: Annotated[
        int,
        (
            "Completions that may wait for their first token; more are answered with 429. 512 are "
            "several times what a group's pipeline holds, and still answered within a usual "
            "timeout."
        ),
    ] = 512
    max_attempts: Annotated[
        int,
        (
            "Workers that are tried for one completion. 8 outlives a rolling restart; a prompt "
            "that kills its workers must end some time."
        ),
    ] = 8
    worker_wait_seconds: Annotated[
        float,
        (
            "How long a request waits for any worker to be there, before 503. 30 s is longer than "
            "a worker's restart."
        ),
    ] = 30.0
    stall_seconds: Annotated[
        float,
        (
            "How long a worker that holds a request may give no token, before 504. 600 s leaves a "
            "prompt of a million tokens its time."
        ),
    ] = 600.0
    canary_seconds: Annotated[
        float,
        "How long a one-token probe may take. 60 s leaves it its time behind long prompts.",
    ] = 60.0
    keepalive_seconds: Annotated[
        float,
        (
            "After this silence a stream gets an SSE comment, and a stream without a first token "
            "its headers. 15 s is below the idle timeouts of common proxies."
        ),
    ] = 15.0
    drain_seconds: Annotated[
        float,
        "How long streams may go on after SIGTERM. 30 s is Kubernetes' default grace period.",
    ] = 30.0
    max_body_bytes: Annotated[
        int,
        "Largest request body, in bytes. 32 MiB hold a prompt of a million tokens as JSON.",
    ] = 32 * 1024 * 1024
    discovery_seconds: Annotated[
        float,
        (
            "Time between two looks at the discovery file. A worker is listed when its process "
            "starts, so half a second is over long before it can work."
        ),
    ] = 0.5
    log_level: Annotated[
        str,
        "debug, info, warning or error.",
    ] = "info"

    def __post_init__(self) -> None:
        """Refuse impossible values. Raises ConfigurationError naming the flag."""
        if not 0 <= self.port < 65536:
            raise ConfigurationError(f"--port {self.port} is not a TCP port (0 to 65535)")
        if self.fd is not None and self.fd < 0:
            raise ConfigurationError(f"--fd {self.fd} is not a file descriptor")
        for name in ("max_queue", "max_attempts", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{_flag(name)} must be at least 1")
        for name in _SECONDS:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{_flag(name)} must be more than 0 seconds")
        self._check_wake()
        if self.log_level not in {"debug", "info", "warning", "error"}:
            raise ConfigurationError(f"--log-level {self.log_level!r} is not a level")

    def _check_wake(self) -> None:
        for each in self.wake:
            role, _, scaler = each.partition("=")
            if role not in {"decode", "prefill"} or not _SCALER.fullmatch(scaler):
                raise ConfigurationError(
                    f"--wake {each!r} is malformed; write decode=SCALER or prefill=SCALER"
                )
        if self.wake and not self.discovery.startswith("kubernetes:"):
            raise ConfigurationError(
                "--wake needs --discovery kubernetes:…: only there a role can be scaled to zero"
            )

    @property
    def scalers(self) -> dict[Literal["decode", "prefill"], str]:
        """The RoleScaler of each role that may sleep."""
        pairs = dict(each.split("=", 1) for each in self.wake)
        roles: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
        return {role: pairs[role] for role in roles if role in pairs}


_SCALER = re.compile(r"[a-z0-9]([-a-z0-9]{0,251}[a-z0-9])?")
_SECONDS = (
    "wake_seconds",
    "group_wait_seconds",
    "worker_wait_seconds",
    "stall_seconds",
    "canary_seconds",
    "keepalive_seconds",
    "drain_seconds",
    "discovery_seconds",
)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line (default: this process's).

    Raises:
        ConfigurationError: a value is impossible.
        SystemExit: with EX_CONFIG (78), a flag is unknown, missing or malformed.
    """
    parser = _Parser(
        prog="penstock-router",
        description="The OpenAI API in front of Penstock's workers.",
        allow_abbrev=False,
    )
    hints = get_type_hints(Settings, include_extras=True)
    for each in fields(Settings):
        hint, text = get_args(hints[each.name])
        _add_flag(parser, each, hint, text)
    found = vars(parser.parse_args(arguments))
    found["wake"] = tuple(found["wake"])
    if found["kubernetes_api"] is None:
        found["kubernetes_api"] = in_cluster_api(os.environ)
    return Settings(**found)


def in_cluster_api(environment: Mapping[str, str]) -> str | None:
    """Return the URL of the API that Kubernetes tells its pods, None outside a cluster."""
    host = environment.get("KUBERNETES_SERVICE_HOST")
    if not host:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"https://{host}:{environment.get('KUBERNETES_SERVICE_PORT', '443')}"


class _Parser(argparse.ArgumentParser):
    """Ends with EX_CONFIG, so that the operator can tell a refused setting from a crash."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_CONFIG, f"{self.prog}: {message}\n")


def _add_flag(parser: argparse.ArgumentParser, each: Field[Any], hint: Any, text: str) -> None:
    required = each.default is MISSING
    text = text.replace("%", "%%")
    if not required and each.default not in {None, "", ()}:
        text += f" Default: {each.default}."
    default = None if required else each.default
    if hint is bool:
        parser.add_argument(
            _flag(each.name), action=argparse.BooleanOptionalAction, default=default, help=text
        )
        return
    if hint == tuple[str, ...]:
        parser.add_argument(_flag(each.name), action="append", default=[], help=text)
        return
    kind = next((t for t in (Path, int, float) if hint in {t, t | None}), str)
    parser.add_argument(_flag(each.name), type=kind, default=default, required=required, help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
