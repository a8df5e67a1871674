"""Measures a whole service on this machine, disaggregated against aggregated, through its HTTP API.

The service is started by `penstock up`, as a user would, in turn in two shapes:

  disaggregated   a prefill group of two stages, one decode worker
  aggregated      one decode worker that prefills for itself

and asked by streaming clients. Prompts are random token ids, never the same one twice.

  ready        seconds from `penstock up` to its return, when a request would succeed
  TTFT         from sending a request to its first token
  ITL          mean time between two tokens of one answer
  throughput   output tokens and prompt tokens, all clients together, by the wall clock
  memory       PSS of each process when the load is over: pages shared by several are divided
  exposed      after a stage has computed a prompt's last chunk, the time until its last KV page has
               arrived at the decode worker: what of the transfer is not hidden behind compute. The
               stages' times overlap; the larger one is put in relation to TTFT.

Clients are on the same machine and take a little of its time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from common import (
    CACHE,
    RESULTS,
    Report,
    Spread,
    busy_seconds,
    cores,
    end_on_sigterm,
    free_port,
    load_average,
    process_memory,
    prompts,
    say,
    table,
    wait_for_calm,
)
from completions import Answer, ask, connect
from make_model import ensure_model
from servers import manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ("disaggregated", "aggregated")
SEEDS = itertools.count()
"""Of prompts: every one is used once, so that no prompt is found in a cache."""


# --- the service ------------------------------------------------------------------------------


def shaped(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the manifest of one of the shapes."""
    if shape == "aggregated":
        roles: dict[str, Any] = {"decode": {"resources": {"cpu": args.aggregated_threads}}}
    else:
        roles = {
            "decode": {"resources": {"cpu": args.decode_threads}},
            "prefill": {"pipelineParallel": 2, "resources": {"cpu": args.stage_threads}},
        }
    return manifest(args.model, args.dtype, args.max_model_len, args.kv_memory, **roles)


class Service:
    """A service that runs."""

    def __init__(self, penstock: Penstock, url: str, ready_seconds: float) -> None:
        self._penstock = penstock
        self.url = url
        self.ready_seconds = ready_seconds

    def processes(self) -> list[dict[str, Any]]:
        """Return what `penstock ps` shows."""
        pods: list[dict[str, Any]] = json.loads(self._penstock.run("ps", "-o", "json"))
        return pods

    def memory(self) -> dict[str, dict[str, float]]:
        """Return the memory of each process, by its name."""
        return {pod["name"]: asdict(process_memory(pod["pid"])) for pod in self.processes()}

    def stage_states(self) -> list[dict[str, Any]]:
        """Return /state of each prefill stage, in the order of the stages."""
        stages = [pod for pod in self.processes() if pod["role"] == "prefill"]
        stages.sort(key=lambda pod: pod["stage"])
        return [httpx.get(f"http://{pod['http']}/state", timeout=30).json() for pod in stages]


class Penstock:
    """The command, with a state directory of its own."""

    def __init__(self, state: Path, wait_policy: str | None, timeout: float) -> None:
        # Processes inherit the environment of `penstock up`.
        self._environment = {} if wait_policy is None else {"OMP_WAIT_POLICY": wait_policy}
        self._base = [sys.executable, "-m", "penstock_operator.cli"]
        self._state = state
        self._timeout = timeout

    def run(self, command: str, *arguments: str) -> str:
        """Run a command and return what it printed."""
        done = subprocess.run(
            [*self._base, command, "--state-dir", str(self._state), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=self._timeout,
            env=os.environ | self._environment,
        )
        if done.returncode:
            raise SystemExit(f"penstock {command} failed:\n{done.stdout}{done.stderr}")
        return done.stdout


@contextlib.contextmanager
def running(shape: str, args: argparse.Namespace) -> Iterator[Service]:
    """Run the service while the context lasts; nothing of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        file = Path(folder) / "service.yaml"
        file.write_text(json.dumps(shaped(shape, args)))  # JSON is YAML
        port = free_port()
        penstock = Penstock(Path(folder) / "state", args.wait_policy, args.timeout)
        started = time.monotonic()
        try:
            penstock.run("up", "-f", str(file), "--port", str(port), "--detach")
            seconds = time.monotonic() - started
            yield Service(penstock, f"http://127.0.0.1:{port}", seconds)
        finally:
            penstock.run("down", "--grace", "1")


# --- clients ----------------------------------------------------------------------------------


async def load(args: argparse.Namespace, url: str, clients: int, length: int) -> dict[str, Any]:
    """Run closed-loop clients, each with some requests one after another."""
    async with connect(url, args.timeout) as client:

        async def one() -> list[Answer]:
            return [
                await ask(client, prompts(next(SEEDS), 1, length)[0], args.output)
                for _ in range(args.requests)
            ]

        busy, started = busy_seconds(), time.perf_counter()
        answers = list(itertools.chain(*await asyncio.gather(*(one() for _ in range(clients)))))
        seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "prompt": length,
        "ttft": [answer.ttft for answer in answers],
        "itl": [answer.itl for answer in answers],
        "output_rate": len(answers) * args.output / seconds,
        "prompt_rate": len(answers) * length / seconds,
        "seconds": seconds,
        "busy_cores": (busy_seconds() - busy) / seconds,
    }


async def exposed(args: argparse.Namespace, service: Service) -> dict[str, Any]:
    """Ask one long prompt; return TTFT and each stage's exposed transfer time."""
    before = service.stage_states()
    async with connect(service.url, args.timeout) as client:
        answer = await ask(client, prompts(next(SEEDS), 1, args.long_prompt)[0], 2)
    after = service.stage_states()
    keys = ("exposed_transfer_seconds", "compute_seconds", "wait_seconds", "kv_bytes_written")
    deltas = {key: [b[key] - a[key] for a, b in zip(before, after, strict=True)] for key in keys}
    share = max(deltas["exposed_transfer_seconds"]) / answer.ttft
    return {"prompt": args.long_prompt, "ttft": answer.ttft, "share": share, **deltas}


async def measure(args: argparse.Namespace, service: Service, shape: str) -> dict[str, Any]:
    """Measure everything of one start of the service."""
    say(f"{shape} is ready after {service.ready_seconds:.1f} s")
    measured: dict[str, Any] = {"shape": shape, "ready_seconds": service.ready_seconds}
    measured["memory_at_start"] = service.memory()
    # Not counted: first uses of code and memory, and what the cost model learns from.
    for _ in range(2):
        await load(args, service.url, 1, max(args.prompt))
    measured["loads"] = []
    for length, clients in itertools.product(args.prompt, args.clients):
        await asyncio.to_thread(wait_for_calm, args.wait_for_calm)
        result = await load(args, service.url, clients, length)
        ttft, itl = (Spread.of(result[key]).text(0, 1000) for key in ("ttft", "itl"))
        say(f"{shape}, {clients} with {length} tokens: TTFT {ttft} ms, ITL {itl} ms")
        measured["loads"].append(result)
    measured["long"] = []
    for _ in range(args.long_requests):
        await asyncio.to_thread(wait_for_calm, args.wait_for_calm)
        result = await exposed(args, service) if shape == "disaggregated" else {}
        if not result:
            async with connect(service.url, args.timeout) as client:
                answer = await ask(client, prompts(next(SEEDS), 1, args.long_prompt)[0], 2)
            result = {"prompt": args.long_prompt, "ttft": answer.ttft}
        share = f", exposed transfer {result['share']:.2%} of it" if "share" in result else ""
        say(f"{shape}, a prompt of {args.long_prompt}: TTFT {result['ttft']:.2f} s{share}")
        measured["long"].append(result)
    measured["memory_at_end"] = service.memory()
    return measured


# --- tables -----------------------------------------------------------------------------------


def load_table(runs: list[dict[str, Any]]) -> str:
    """Return TTFT, ITL and throughput by load and shape."""
    columns = ["prompt", "clients", "shape", "TTFT, ms", "ITL, ms", "output tokens/s"]
    columns.append("prompt tokens/s")
    rows = []
    keys = [(run["prompt"], run["clients"]) for run in runs[0]["loads"]]
    shapes = [shape for shape in SHAPES if any(run["shape"] == shape for run in runs)]
    for (length, clients), shape in itertools.product(keys, shapes):
        found = [
            result
            for run in runs
            if run["shape"] == shape
            for result in run["loads"]
            if (result["prompt"], result["clients"]) == (length, clients)
        ]
        rows.append(
            (
                f"{length:,}",
                str(clients),
                shape,
                Spread.of(itertools.chain(*(r["ttft"] for r in found))).text(0, 1000),
                Spread.of(itertools.chain(*(r["itl"] for r in found))).text(0, 1000),
                Spread.of(r["output_rate"] for r in found).text(),
                Spread.of(r["prompt_rate"] for r in found).text(0),
            )
        )
    return table(columns, rows)


def start_table(runs: list[dict[str, Any]]) -> str:
    """Return the time to ready and the long prompt's times by shape."""
    columns = ("shape", "ready, s", "TTFT of the long prompt, s", "exposed transfer, % of it")
    rows = []
    for shape in SHAPES:
        found = [run for run in runs if run["shape"] == shape]
        long = [result for run in found for result in run["long"]]
        shares = [result["share"] for result in long if "share" in result]
        rows.append(
            (
                shape,
                Spread.of(run["ready_seconds"] for run in found).text(),
                Spread.of(result["ttft"] for result in long).text(2) if long else "-",
                Spread.of(shares).text(2, 100) if shares else "-",
            )
        )
    return table(columns, rows)


def memory_table(runs: list[dict[str, Any]]) -> str:
    """Return the memory of each process in the last start of each shape."""
    rows = []
    for shape in SHAPES:
        run = [run for run in runs if run["shape"] == shape][-1]
        first, last = run["memory_at_start"], run["memory_at_end"]
        rows += [
            (
                shape,
                name,
                f"{first[name]['pss']:,.0f}",
                f"{last[name]['pss']:,.0f}",
                f"{last[name]['rss']:,.0f}",
            )
            for name in last
        ]
    return table(("shape", "process", "PSS at start", "PSS at the end", "RSS, MiB"), rows)


# --- command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = p.add_argument
    a("--rounds", type=int, default=2, help="starts of each shape, in turn (default: 2)")
    a("--clients", nargs="+", type=int, default=[1, 4, 8], help="at once (default: 1 4 8)")
    a("--prompt", nargs="+", type=int, default=[128, 2048], help="lengths (default: 128 2048)")
    a("--output", type=int, default=32, help="output tokens a request (default: 32)")
    a("--requests", type=int, default=3, help="requests a client and load (default: 3)")
    a("--long-prompt", type=int, default=8192, help="for the exposed transfer (default: 8192)")
    a("--long-requests", type=int, default=3, help="such prompts a start (default: 3)")
    a("--stage-threads", type=int, default=1, help="of each prefill stage (default: 1)")
    a("--decode-threads", type=int, default=1, help="of decode, disaggregated (default: 1)")
    a("--aggregated-threads", type=int, default=cores(), help="(default: all cores)")
    a(
        "--wait-policy",
        choices=["passive", "active"],
        help="OMP_WAIT_POLICY of the workers: whether a compute thread that waits for another "
        "sleeps or spins (default: not set)",
    )
    a("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    a("--kv-memory", default="1Gi", help="of each worker (default: 1Gi)")
    a("--max-model-len", type=int, default=16384, help="(default: 16384)")
    a("--model", type=Path, default=CACHE / "qwen3-210m", help="written if it is missing")
    a(
        "--wait-for-calm",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait at most so long before each load for the cores to be idle (default: 0)",
    )
    a("--timeout", type=float, default=900, help="of a command or request, s (default: 900)")
    a("--out", type=Path, default=RESULTS / "local_service.json", help="raw results")
    return p


def main() -> None:
    end_on_sigterm()
    args = parser().parse_args()
    ensure_model(args.model)
    report = Report(args.out)
    runs: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for shape in SHAPES if number % 2 == 0 else SHAPES[::-1]:
            say(f"round {number + 1}/{args.rounds}: starting {shape}")
            with running(shape, args) as service:
                runs.append(asyncio.run(measure(args, service, shape)))
            report.write(runs=runs)
    print("\nmedian (minimum to maximum)\n")
    for text in (load_table(runs), start_table(runs), memory_table(runs)):
        print(text, end="\n\n")
    print(f"load average {load_average():.1f}; samples in {args.out}")


if __name__ == "__main__":
    main()
