"""The cluster from the command line: up, down, images."""

from __future__ import annotations

import argparse
import sys

from e2e.cluster import cache, programs
from e2e.cluster.cluster import Cluster, remove
from e2e.cluster.errors import ClusterError
from e2e.cluster.settings import Settings
from e2e.images.build import build_all

_HELP = {
    "up": "build what is missing, and start the cluster unless it runs",
    "images": "rebuild the images of this tree and load them into the running cluster",
    "down": "end and remove the cluster, or what an interrupted run left of it",
}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--nodes", type=int, default=2, help="how many nodes (default 2)")
    arguments = parser.parse_args()
    try:
        run(arguments.command, Settings(nodes=arguments.nodes))
    except (ClusterError, ValueError) as error:
        print(f"e2e: {error}", file=sys.stderr)
        return 1
    return 0


def run(command: str, settings: Settings) -> None:
    """Carry out one command. Raises ClusterError."""
    programs.require_root()
    with cache.locked("cluster"):
        if command == "down":
            remove(settings)
            return
        programs.require_debian_packages()
        cluster = Cluster(settings, programs.build())
        if command == "images" or not cluster.is_up():
            cluster.up_to_date(build_all())
        print(f"export KUBECONFIG={settings.kubeconfig}")


if __name__ == "__main__":
    sys.exit(main())
