"""A worker whose other ranks run on other hosts: `penstock-worker`, with places before its flags.

Tensor parallelism over a slow network is nothing that a service offers; it is what `pp_vs_tp`
measures pipelines against.

    ranks_elsewhere.py '[{"address": …, "command": […]}, …]' --role prefill …
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from penstock_runtime.worker.main import Process
from penstock_runtime.worker.rank_group import Place
from penstock_runtime.worker.settings import parse


def main() -> None:
    """Run the worker until it is told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    places = [
        Place(place["address"], tuple(place["command"]) or Place().command)
        for place in json.loads(sys.argv[1])
    ]
    sys.exit(asyncio.run(Process(parse(sys.argv[2:]), places).run()))


if __name__ == "__main__":
    main()
