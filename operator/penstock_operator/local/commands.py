"""The commands of `penstock` that deal with services on this machine. Each returns an exit code."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from penstock_operator import manifests
from penstock_operator.crds import DEFINITIONS, crd_text
from penstock_operator.errors import NotRunning, ServiceFailed, StateError
from penstock_operator.local import client, tables
from penstock_operator.local.desired import api_key_file, read_desired
from penstock_operator.local.follow import LogReader
from penstock_operator.local.logs import Terminal
from penstock_operator.local.settings import LocalSettings, default_programs
from penstock_operator.local.state import StateDir, default_root
from penstock_wire.keys import PUBLIC_FILE, SECRET_FILE, Keys

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from penstock_operator.labels import Role

_POLL_SECONDS = 0.2
_STOP_MARGIN_SECONDS = 10.0
"""Beyond grace and kill times, until `down` calls it a failure."""


# --- starting and stopping --------------------------------------------------------------------


def up(args: Namespace) -> int:
    """Start a service and stay with it, or leave it in the background."""
    # Here, because the HTTP client takes as long to import as all other commands take to run.
    from penstock_operator.local.supervisor import Supervisor  # noqa: PLC0415

    service = client.renamed(client.read_manifest(args.file), args.name)
    client.check_runs_here(service)
    state = StateDir(_root(args), service.name)
    settings = LocalSettings(
        host=args.host,
        port=args.port,
        programs={**default_programs(), **dict(args.program)},
        secrets={name: Path(file).absolute() for name, file in args.secret},
        shutdown_grace=args.grace,
    )
    if not args.detach:
        terminal = Terminal(quiet=args.quiet)
        asyncio.run(Supervisor(service, state, settings, terminal).run())
        return 0
    process = client.detach(state, service, _up_options(args))
    status = client.wait_ready(state, process, limit=args.timeout)
    model, key = service.spec.model.served_name, api_key_file(state, service)
    print(f"{service.name} is ready at {status.url} (pid {process.pid}); try\n")
    print(tables.example_request(status.url, model, key))
    print(f"\nstop it with `penstock down --name {service.name}`")
    return 0


def _up_options(args: Namespace) -> list[str]:
    """Return the options of `up` for the process in the background."""
    options = ["--state-dir", str(_root(args)), "--host", args.host, "--grace", str(args.grace)]
    if args.port is not None:
        options += ["--port", str(args.port)]
    for name, command in args.program:
        options += ["--program", f"{name}={json.dumps(list(command))}"]
    for name, file in args.secret:
        options += ["--secret", f"{name}={Path(file).absolute()}"]
    return options


def down(args: Namespace) -> int:
    """Stop a service."""
    state = client.find(_root(args), args.name)
    settings = LocalSettings()
    limit = args.grace + settings.kill_seconds + _STOP_MARGIN_SECONDS
    client.down(state, limit=limit, now=args.now)
    print(f"{state.name} has ended")
    return 0


def apply(args: Namespace) -> int:
    """Change a running service."""
    service = client.renamed(client.read_manifest(args.file), args.name)
    client.check_runs_here(service)
    state = client.find(_root(args), service.name)
    changed = client.apply(state, service)
    print(f"{service.name} {'configured' if changed else 'unchanged'}")
    return 0


def scale(args: Namespace) -> int:
    """Change numbers of replicas of a running service."""
    state = client.find(_root(args), args.name)
    for role, replicas in args.replicas:
        client.scale(state, cast("Role", role), replicas)
        print(f"{state.name}: {role} scaled to {replicas}")
    return 0


# --- looking ----------------------------------------------------------------------------------


def get(args: Namespace) -> int:
    """Show services."""
    if args.watch:
        return _watch(args)
    states = _chosen(args)
    documents = [_document(state) for state in states]
    if args.output in ("json", "yaml"):
        one = (
            documents[0] if args.name else {"apiVersion": "v1", "kind": "List", "items": documents}
        )
        _print_document(one, args.output)
    elif states:
        print(_get_table(states, wide=args.output == "wide"))
    else:
        print(f"no service runs here ({_root(args)}); start one with `penstock up`")
    return 0


def _watch(args: Namespace) -> int:
    """Print a row whenever it changes, until Ctrl-C or until nothing runs any more."""
    shown: dict[str, str] = {}
    wide = args.output == "wide"
    while states := _chosen(args, required=bool(not shown)):
        for state in states:
            heading, row = _get_table([state], wide=wide).split("\n")
            stable = row.rsplit(maxsplit=1)[0] if not wide else row
            if not shown:
                print(heading, flush=True)
            if shown.get(state.name) != stable:
                shown[state.name] = stable
                print(row, flush=True)
        time.sleep(_POLL_SECONDS)
    return 0


def ps(args: Namespace) -> int:
    """Show the processes of a service."""
    pods = client.pods_of(client.find(_root(args), args.name))
    if args.output == "json":
        print(json.dumps(pods, indent=2))
    else:
        print(tables.table(tables.PS_COLUMNS, map(tables.ps_row, pods)))
    return 0


def describe(args: Namespace) -> int:
    """Show everything about a service."""
    state = client.find(_root(args), args.name)
    service = read_desired(state).service
    print(tables.describe(service, client.status_of(state), client.pods_of(state), _age(state)))
    return 0


def logs(args: Namespace) -> int:
    """Print what pods printed."""
    state = client.find_with_logs(_root(args), args.name)
    reader = LogReader(state, args.role, tail=args.tail)
    if not reader.files():
        raise NotRunning(
            f"{state.name} has no logs of {args.role!r}",
            remedy=f"choose one of {', '.join(reader.known()) or 'none yet'}",
        )
    reader.print_new()
    while args.follow and state.owner() is not None:
        time.sleep(_POLL_SECONDS)
        reader.print_new()
    return 0


def render(args: Namespace) -> int:
    """Print the Kubernetes objects of a manifest."""
    service = client.renamed(client.read_manifest(args.file), args.name)
    pair = Keys.generate() if args.with_keys else None
    keys = {PUBLIC_FILE: pair.public.decode(), SECRET_FILE: pair.secret.decode()} if pair else None
    objects = manifests.render(service, manifests.Inputs(keys=keys))
    print(dump_objects(objects), end="")
    return 0


def crds(args: Namespace) -> int:
    """Print the CustomResourceDefinitions."""
    plurals = [args.plural] if args.plural else list(DEFINITIONS)
    print("---\n".join(map(crd_text, plurals)), end="")
    return 0


def chat(args: Namespace) -> int:
    """Talk to the model."""
    from penstock_operator.local.chat import Chat, answer, converse  # noqa: PLC0415 - as in `up`

    state = client.find(_root(args), args.name)
    status, service = client.status_of(state), read_desired(state).service
    if status is None or status.condition("Ready").status != "True":
        reason = status.condition("Ready").message if status else "it has just started"
        raise ServiceFailed(
            f"{state.name} is not ready: {reason}",
            remedy="wait for it with `penstock get -w`",
        )
    file = api_key_file(state, service)
    talk = Chat(
        status.url,
        service.spec.model.served_name,
        api_key=file.read_text(encoding="utf-8").split()[0] if file else None,
        system=args.system,
    )
    try:
        if args.message:
            answer(talk, " ".join(args.message))
        else:
            converse(talk, sys.stdin)
    finally:
        talk.close()
    return 0


# --- parts ------------------------------------------------------------------------------------


def dump_objects(objects: Sequence[manifests.Object]) -> str:
    """Return objects as a stream of YAML documents, without anchors."""
    return yaml.dump_all(objects, Dumper=_PlainDumper, sort_keys=False, width=100)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


def _root(args: Namespace) -> Path:
    return Path(args.state_dir).absolute() if args.state_dir else default_root()


def _chosen(args: Namespace, *, required: bool = True) -> list[StateDir]:
    """Return the named service, or all that run."""
    if args.name is None:
        return client.running(_root(args))
    try:
        return [client.find(_root(args), args.name)]
    except NotRunning:
        if required:
            raise
        return []


def _get_table(states: list[StateDir], *, wide: bool) -> str:
    columns = tables.GET_COLUMNS + (tables.WIDE_COLUMNS if wide else ())
    rows = [
        tables.get_row(read_desired(state).service, client.status_of(state), _age(state), wide=wide)
        for state in states
    ]
    return tables.table(columns, rows)


def _document(state: StateDir) -> dict[str, object]:
    return tables.document(read_desired(state).service, client.status_of(state))


def _print_document(found: object, form: str) -> None:
    if form == "json":
        print(json.dumps(found, indent=2))
    else:
        print(yaml.safe_dump(found, sort_keys=False, width=100), end="")


def _age(state: StateDir) -> str:
    """Return the time since the supervisor took the lock."""
    try:
        since = datetime.fromtimestamp(state.lock_file.stat().st_mtime, UTC)
    except OSError as error:
        raise StateError(f"{state.lock_file} cannot be read: {error}") from error
    return tables.age_text(since, datetime.now(UTC))
