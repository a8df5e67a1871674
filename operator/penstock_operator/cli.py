"""The `penstock` command: parsing and exit codes. What commands do is in `local.commands`."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from penstock_operator.crds import DEFINITIONS
from penstock_operator.errors import PenstockError
from penstock_operator.labels import ROLES
from penstock_operator.local import commands
from penstock_operator.local.logs import silence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - no public name

_EPILOG = """\
examples:
  penstock up                          serve the built-in demo at http://127.0.0.1:8000
  penstock up -f service.yaml          serve what a manifest describes
  penstock get -w                      watch columns and conditions
  penstock chat                        talk to the model
  penstock scale decode=2              run two decode workers
  penstock render -f service.yaml      print the objects for Kubernetes
  penstock crds                        print the resource definitions for Kubernetes
  penstock down                        stop it

exit codes: 0 done, 1 failed, 2 wrong usage or a refused manifest, 3 no such service runs,
130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Errors are told in a sentence, with a remedy."""
    args = build_parser().parse_args(arguments)
    handler: Callable[[argparse.Namespace], int] = args.handler
    try:
        return handler(args)
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        silence(sys.stdout)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="penstock",
        description="Serve large language models, on this machine or on Kubernetes, from one "
        "manifest.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_starting(add)
    _add_changing(add)
    _add_looking(add)
    _add_planning(add)
    return parser


def _command(
    add: _Commands,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = add.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where services keep their state (default: penstock below $XDG_RUNTIME_DIR, or "
        "~/.local/state/penstock)",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the service (default: the only one that runs)"
    )
    return parser


def _add_starting(add: _Commands) -> None:
    up = _command(
        add,
        "up",
        commands.up,
        "start a service on this machine and stay with it until Ctrl-C",
        "penstock up -f service.yaml --port 9000",
    )
    _file_option(up, "the manifest, - for standard input (default: the built-in demo)")
    up.add_argument("--port", type=_port, help="TCP port of the API (default: router.port, 8000)")
    up.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the API; another one opens it to the network (default: 127.0.0.1)",
    )
    up.add_argument("-d", "--detach", action="store_true", help="return when it is ready")
    up.add_argument(
        "--timeout",
        type=_seconds,
        default=1800.0,
        metavar="SECONDS",
        help="with --detach, how long to wait for that (default: 1800, a large download)",
    )
    up.add_argument("-q", "--quiet", action="store_true", help="do not print the pods' logs")
    _grace_option(up)
    up.add_argument(
        "--secret",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=PATH",
        help="file that stands for a Secret of the manifest (apiKeySecret, tokenSecret), or a "
        "directory with a file for each of its entries",
    )
    up.add_argument(
        "--program",
        action="append",
        default=[],
        type=_program,
        metavar="COMMAND=PROGRAM",
        help="run another program for a container's command, such as a debugger or profiler: "
        "--program 'penstock-worker=py-spy record -o out.svg -- penstock-worker'",
    )
    down = _command(
        add, "down", commands.down, "stop a service; nothing of it is left", "penstock down"
    )
    down.add_argument("--now", action="store_true", help="do not let requests end")
    _grace_option(down)


def _add_changing(add: _Commands) -> None:
    apply = _command(
        add,
        "apply",
        commands.apply,
        "change a running service to a manifest, without errors for its clients",
        "penstock apply -f service.yaml",
    )
    _file_option(apply, "the manifest, - for standard input", required=True)
    scale = _command(
        add, "scale", commands.scale, "change numbers of replicas", "penstock scale decode=2"
    )
    scale.add_argument(
        "replicas",
        nargs="+",
        type=_replicas,
        metavar="ROLE=N",
        help="prefill=N groups, decode=N workers",
    )


def _add_planning(add: _Commands) -> None:
    """Add the commands that the runtime's simulator brings, where the runtime is installed.

    Loaded by name: the planes do not import each other.
    """
    try:
        planning = importlib.import_module("penstock_runtime.simulator.cli")
    except ModuleNotFoundError:
        return
    for command in (planning.add_explain_chunks, planning.add_plan_capacity, planning.add_timeline):
        command(add)


def _add_looking(add: _Commands) -> None:
    get = _command(
        add, "get", commands.get, "show services, as `kubectl get` does", "penstock get -o wide"
    )
    get.add_argument("-w", "--watch", action="store_true", help="go on with every change")
    get.add_argument("-o", "--output", choices=["wide", "json", "yaml"], help="form of the output")
    ps = _command(add, "ps", commands.ps, "show a service's processes", "penstock ps -o json")
    ps.add_argument("-o", "--output", choices=["json"], help="form of the output")
    _command(
        add,
        "describe",
        commands.describe,
        "show conditions and processes with all reasons",
        "penstock describe",
    )
    logs = _command(
        add, "logs", commands.logs, "print what processes printed", "penstock logs decode -f"
    )
    logs.add_argument("role", help="a role, or a process as `penstock ps` names it")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    logs.add_argument("--tail", type=int, metavar="N", help="begin with the last N lines")
    render = _command(
        add,
        "render",
        commands.render,
        "print the Kubernetes objects of a manifest",
        "penstock render -f service.yaml | kubectl diff -f -",
    )
    _file_option(render, "the manifest, - for standard input (default: the built-in demo)")
    render.add_argument(
        "--with-keys",
        action="store_true",
        help="add the Secret with a new key pair (default: left out, the operator makes it)",
    )
    crds = _command(
        add,
        "crds",
        commands.crds,
        "print the CustomResourceDefinitions",
        "penstock crds | kubectl apply --server-side -f -",
    )
    crds.add_argument(
        "plural",
        nargs="?",
        choices=list(DEFINITIONS),
        help="only this one (default: all)",
    )
    chat = _command(
        add,
        "chat",
        commands.chat,
        "talk to the model in the terminal",
        "penstock chat 'Why is the sky blue?'",
    )
    chat.add_argument("message", nargs="*", help="one question (default: a conversation)")
    chat.add_argument("--system", metavar="TEXT", help="instructions before the conversation")


def _file_option(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", required=required, help=text)


def _grace_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long requests may go on when the service ends (default: 10)",
    )


# --- values -----------------------------------------------------------------------------------


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a TCP port (1 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _program(text: str) -> tuple[str, tuple[str, ...]]:
    """Accept a command line in shell syntax, or a JSON list of arguments."""
    name, value = _pair(text)
    try:
        words = json.loads(value) if value.startswith("[") else shlex.split(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not a command line: {error}") from error
    if not words or not all(isinstance(word, str) for word in words):
        raise argparse.ArgumentTypeError(f"{value!r} is not a command line")
    return name, tuple(words)


def _replicas(text: str) -> tuple[str, int]:
    role, value = _pair(text)
    if role not in ROLES:
        raise argparse.ArgumentTypeError(f"{role!r} is not one of {', '.join(ROLES)}")
    if role == "router":
        raise argparse.ArgumentTypeError("one machine has one router: it owns the API's address")
    if not value.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of replicas")
    return role, int(value)


if __name__ == "__main__":
    sys.exit(main())
