"""Pipeline against tensor parallelism on a slow network, with real workers.

Worker processes of one compute thread each run on hosts of their own (network namespaces) whose
links have a chosen speed; a decode worker and a router on another host are the client's side.

  one         one prefill worker
  pp2, pp4    a pipeline of two or four stages
  tp2, tp4    one stage of two or four ranks, which sum their results in every layer

Every worker's host has one core, for its compute thread and all its other threads. The client's
side has the cores that are left, or shares the last one. With four workers on fewer cores, each has
a part of a core: their speed-up is limited by the cores and not by the network, so it is shown
beside the share of a core that each had.

  TTFT        of one prompt alone, from the request to its first token
  speed-up    TTFT of `one` by that of the layout, in the same round
  efficiency  speed-up by workers
  bubble      share of the time in which a stage did not compute, mean of the stages; pipelines only
  bytes       sent between workers on all links, as traffic control counted them with all headers,
              in relation to the formula:
                pipeline of P stages      S · H · (P - 1) elements
                tensor, T ranks           2 (T - 1) · S · H · (2 L + 1) elements: a ring's sum sends
                                          2 (T - 1) / T of a tensor from every rank, twice a layer
                                          and once for the embedding
              for a prompt of S tokens, hidden size H, L layers; elements that are handed on are
              of the model's dtype, those that are summed float32
  B/flop      bytes a second of one link by the arithmetic that one worker does a second (measured
              with `one`): what says how slow a network is for these workers. A node of eight H20
              (296 TFLOP/s each in FP8) with one NIC of 400 Gbit/s has 2.1e-5, with eight 1.7e-4.

Needs root, Linux's traffic control and iproute2. Nothing outside the namespaces is touched.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from common import RESULTS, Report, Spread, cores, end_on_sigterm, prompts, say, table
from links import CLIENT, enter, links
from make_model import ensure_model

from penstock_runtime.model.arithmetic import half_layer_flops
from penstock_runtime.model.config import ModelConfig
from penstock_wire.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from links import Links

NAME = "bench"
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Of activations that stages hand on, by the model's dtype."""
SUM_BYTES = 4
"""Of what ranks sum: float32 always."""
SEEDS = itertools.count(1)
_READY_SECONDS = 240
_END_SECONDS = 30


@dataclass(frozen=True)
class Layout:
    """How the prefill workers are arranged."""

    name: str
    stages: int = 1
    ranks: int = 1

    @property
    def workers(self) -> int:
        """Processes that compute."""
        return self.stages * self.ranks

    def bytes_between(self, config: ModelConfig, dtype: str, tokens: int) -> int:
        """Return what the workers send each other for a prompt, by the formula.

        Ranks sum twice a layer, and the embedding. Of the last layer they compute keys and values
        only, which they do not sum.
        """
        handed_on = (self.stages - 1) * ITEM_BYTES[dtype]
        summed = 2 * (self.ranks - 1) * (2 * (config.layers - 1) + 1) * SUM_BYTES
        return tokens * config.hidden_size * (handed_on + summed)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("one"),
        Layout("pp2", stages=2),
        Layout("tp2", ranks=2),
        Layout("pp4", stages=4),
        Layout("tp4", ranks=4),
    )
}


# --- the service ------------------------------------------------------------------------------


class Service:
    """The processes of one layout."""

    def __init__(self, made: Links, layout: Layout, args: argparse.Namespace, folder: Path) -> None:
        self._made = made
        self._layout = layout
        self._args = args
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = "http://127.0.0.1:8000"

    def start(self) -> None:
        """Start workers and router; their output goes to files."""
        Keys.generate().save(self._folder / "keys")
        endpoints = [self._stage(i) for i in range(self._layout.stages)] + [self._decode()]
        (self._folder / "endpoints.json").write_text(json.dumps({"endpoints": endpoints}))
        self._start(
            "router",
            *self._made.command(CLIENT),
            *(sys.executable, "-c", "from penstock_router.main import main; main()"),
            *("--name", "router", "--model", self._model, "--served-model-name", NAME),
            *("--discovery", f"file:{self._folder / 'endpoints.json'}", "--require-prefill"),
            *("--keys", str(self._folder / "keys"), "--host", "127.0.0.1", "--port", "8000"),
        )

    def end(self) -> None:
        """End them all."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def states(self) -> list[dict[str, Any]]:
        """Return /state of every stage."""
        hosts = [self._host(stage) for stage in range(self._layout.stages)]
        return [
            httpx.get(f"http://{self._made.address(host)}:7001/state", timeout=30).json()
            for host in hosts
        ]

    def check(self) -> None:
        """Raise SystemExit if a process has ended."""
        for process in self._processes:
            if process.poll() is not None:
                logs = "\n".join(
                    f"{log.name}: {log.read_text()[-600:]}" for log in self._folder.glob("*.log")
                )
                raise SystemExit(f"{process.args!r} has ended:\n{logs}")

    @property
    def _model(self) -> str:
        return f"file://{self._args.model.resolve()}"

    def _host(self, stage: int) -> str:
        return self._made.hosts[stage * self._layout.ranks]

    def _stage(self, stage: int) -> dict[str, Any]:
        host, layout = self._host(stage), self._layout
        address = self._made.address(host)
        hosts = self._made.hosts[stage * layout.ranks :][: layout.ranks]
        places = [
            {
                "address": self._made.address(other),
                "command": self._made.command(
                    other, sys.executable, "-m", "penstock_runtime.worker.rank"
                ),
            }
            for other in hosts
        ]
        program = str(Path(__file__).with_name("ranks_elsewhere.py"))
        peers = [self._made.address(self._host(i)) for i in range(layout.stages)]
        hosts_file = self._folder / "hosts.json"
        hosts_file.write_text(json.dumps({f"stage-{i}": ip for i, ip in enumerate(peers)}))
        self._start(
            f"stage-{stage}",
            *self._made.command(host, sys.executable, program, json.dumps(places)),
            *("--role", "prefill", "--group", "g", "--stage", str(stage)),
            *("--stages", str(layout.stages), "--peers", "stage-{i}:7000"),
            *("--hosts-file", str(hosts_file), "--tensor-parallel", str(layout.ranks)),
            *("--threads", str(layout.ranks), "--name", f"p-{stage}"),
            *("--chunk-mode", self._args.chunk_mode),
            *("--max-chunk-tokens", str(self._args.chunk)),
            *self._common(address, self._args.kv_memory // layout.stages),
        )
        return _endpoint(f"p-{stage}", "prefill", address, stage)

    def _decode(self) -> dict[str, Any]:
        address = self._made.address(CLIENT)
        self._start(
            "decode",
            *self._made.command(CLIENT),
            *(sys.executable, "-c", "from penstock_runtime.worker.main import main; main()"),
            *("--role", "decode", "--name", "d-0", "--threads", "1"),
            *self._common(address, self._args.kv_memory),
        )
        return _endpoint("d-0", "decode", address, 0)

    def _common(self, address: str, kv_memory: int) -> list[str]:
        return [
            *("--model", self._model, "--keys", str(self._folder / "keys")),
            *("--bind", f"{address}:7000", "--http", f"{address}:7001", "--net-device", "eth0"),
            *("--dtype", self._args.dtype, "--kv-memory", str(kv_memory), "--drain-seconds", "1"),
        ]

    def _start(self, name: str, *command: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_WAIT_POLICY": "passive"},
                )
            )


def _endpoint(name: str, role: str, address: str, stage: int) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "group": "g" if role == "prefill" else "",
        "stage": stage,
        "address": f"{address}:7000",
        "revision": "r",
        "http": f"{address}:7001",
    }


@contextlib.contextmanager
def running(made: Links, layout: Layout, args: argparse.Namespace) -> Iterator[Service]:
    """Run a layout's processes while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        service = Service(made, layout, args, Path(folder))
        try:
            service.start()
            yield service
        finally:
            service.end()


async def ready(service: Service) -> None:
    """Return when a request would succeed through the whole layout."""
    deadline = time.monotonic() + _READY_SECONDS
    async with httpx.AsyncClient(base_url=service.url, timeout=5) as client:
        while True:
            service.check()
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get("/ready")).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise SystemExit(f"the service was not ready in {_READY_SECONDS} s")
            await asyncio.sleep(0.1)


# --- measuring --------------------------------------------------------------------------------


async def ask(service: Service, tokens: int) -> float:
    """Return the seconds from a request to its one token."""
    body = {
        "model": NAME,
        "prompt": prompts(next(SEEDS), 1, tokens)[0],
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(base_url=service.url, timeout=3600) as client:
        started = time.perf_counter()
        response = await client.post("/v1/completions", json=body)
        seconds = time.perf_counter() - started
    if response.status_code != 200:
        raise SystemExit(f"HTTP {response.status_code}: {response.text}")
    return seconds


async def sample(
    made: Links,
    service: Service,
    layout: Layout,
    config: ModelConfig,
    dtype: str,
    megabits: float,
    tokens: int,
) -> dict[str, Any]:
    """Return what one prompt took, and what it sent."""
    sent = [made.sent(host) for host in made.hosts]
    before = service.states()
    seconds = await ask(service, tokens)
    after = service.states()
    counted = sum(made.sent(host) - old for host, old in zip(made.hosts, sent, strict=True))
    busy = [b["compute_seconds"] - a["compute_seconds"] for a, b in zip(before, after, strict=True)]
    expected = layout.bytes_between(config, dtype, tokens)
    found: dict[str, Any] = {
        "layout": layout.name,
        "mbit": megabits,
        "tokens": tokens,
        "ttft": seconds,
        "bytes": counted,
        "bytes_by_formula": expected,
        "compute_seconds": busy,
    }
    if layout.stages > 1:
        found["bubble"] = 1 - sum(busy) / len(busy) / seconds
    share = f", bytes {counted / expected:.3f} of the formula" if expected else ""
    say(f"{layout.name}, {megabits:g} Mbit/s, {tokens} tokens: TTFT {seconds:.2f} s{share}")
    return found


async def measure(made: Links, args: argparse.Namespace, report: Report) -> list[dict[str, Any]]:
    """Return all samples: rounds over layouts, so that the machine's moods meet all of them."""
    samples = []
    config = ModelConfig.from_directory(args.model)
    for number in range(args.rounds):
        for name in args.layouts:
            layout = LAYOUTS[name]
            made.set_rate(10_000)
            with running(made, layout, args) as service:
                await ready(service)
                # Not counted: first uses of code and memory, and what the cost model learns from.
                for tokens in args.warm_up:
                    await ask(service, tokens)
                # One worker sends nothing to others, so its one figure is good for every link.
                for megabits in args.mbit if layout.workers > 1 else args.mbit[:1]:
                    made.set_rate(megabits)
                    for tokens in args.tokens:
                        found = await sample(
                            made, service, layout, config, args.dtype, megabits, tokens
                        )
                        samples.append(found | {"round": number})
                        report.write(samples=samples)
    return samples


# --- tables -----------------------------------------------------------------------------------


def results(samples: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each layout, link and prompt length."""
    config = ModelConfig.from_directory(args.model)
    alone = {(s["round"], s["tokens"]): s["ttft"] for s in samples if s["layout"] == "one"}
    rows = []
    for tokens, megabits, name in itertools.product(args.tokens, args.mbit, args.layouts):
        found = [
            s
            for s in samples
            if (s["tokens"], s["layout"]) == (tokens, name)
            and (s["mbit"] == megabits or name == "one")
        ]
        flops = sum(half_layer_flops(config, tokens))
        rate = [flops / alone[s["round"], tokens] for s in found if alone]
        workers = LAYOUTS[name].workers
        rows.append(
            {
                "tokens": tokens,
                "mbit": megabits,
                "layout": name,
                "ttft": [s["ttft"] for s in found],
                "speed_up": [alone[s["round"], tokens] / s["ttft"] for s in found if alone],
                "workers": workers,
                "cores_each": min(1.0, cores() / workers),
                "bubble": [s["bubble"] for s in found if "bubble" in s],
                "bytes": [s["bytes"] / s["bytes_by_formula"] for s in found if workers > 1],
                "bytes_a_flop": [megabits * 125_000 / r for r in rate],
            }
        )
    return rows


def report_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    columns = ("prompt", "link, Mbit/s", "B/flop", "layout", "TTFT, s", "speed-up", "efficiency")
    lines = []
    for row in rows:
        if not row["ttft"]:
            continue
        speed_up = Spread.of(row["speed_up"]) if row["speed_up"] else None
        lines.append(
            (
                f"{row['tokens']:,}",
                f"{row['mbit']:g}",
                f"{row['bytes_a_flop'][0]:.1e}" if row["bytes_a_flop"] else "",
                row["layout"] + (f" ({row['cores_each']:.2g} core each)"),
                Spread.of(row["ttft"]).text(2),
                speed_up.text(2) if speed_up else "",
                f"{speed_up.median / row['workers']:.0%}" if speed_up else "",
                f"{Spread.of(row['bubble']).median:.1%}" if row["bubble"] else "",
                Spread.of(row["bytes"]).text(3) if row["bytes"] else "",
            )
        )
    return table([*columns, "bubble", "bytes / formula"], lines)


def plot(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return an SVG: speed-up by link, one panel a prompt length, one line a layout."""
    width, height, left, bottom = 300, 220, 46, 40
    colours = dict(zip(LAYOUTS, ("#777", "#0a6", "#c40", "#064", "#820"), strict=True))
    panels = []
    top = max((s for row in rows for s in row["speed_up"]), default=1.0) * 1.1
    for number, tokens in enumerate(args.tokens):
        x0 = number * width
        parts = [
            f'<text x="{x0 + left}" y="16">{tokens:,} tokens</text>',
            f'<path d="M{x0 + left} 24V{height - bottom}H{x0 + width - 14}" class="axis"/>',
        ]

        def point(index: int, value: float, x0: int = x0) -> tuple[float, float]:
            step = (width - left - 40) / max(1, len(args.mbit) - 1)
            y = height - bottom - value / top * (height - bottom - 24)
            return x0 + left + 10 + index * step, y

        for index, megabits in enumerate(args.mbit):
            x, _ = point(index, 0)
            parts.append(f'<text x="{x:.0f}" y="{height - 22}" class="n">{megabits:g}</text>')
        for mark in range(1, int(top) + 1):
            _, y = point(0, mark)
            parts.append(f'<text x="{x0 + left - 8}" y="{y + 4:.0f}" class="e">{mark}</text>')
        for name in args.layouts:
            found = {r["mbit"]: r for r in rows if (r["layout"], r["tokens"]) == (name, tokens)}
            points = [
                point(index, Spread.of(found[megabits]["speed_up"]).median)
                for index, megabits in enumerate(args.mbit)
                if found[megabits]["speed_up"]
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" stroke="{colours[name]}"/>')
            if points:
                x, y = points[-1]
                parts.append(
                    f'<text x="{x + 4:.0f}" y="{y + 4:.0f}" fill="{colours[name]}">{name}</text>'
                )
        panels.append("".join(parts))
    style = (
        "text{font:11px sans-serif}.n{text-anchor:middle}.e{text-anchor:end}"
        ".axis{stroke:#000;fill:none}polyline{fill:none;stroke-width:2}"
    )
    total = width * len(args.tokens)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}">'
        f"<style>{style}</style>{''.join(panels)}"
        f'<text x="{left}" y="{height - 4}">speed-up over one worker, by link in Mbit/s</text>'
        "</svg>\n"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = parser.add_argument
    a("--model", type=Path, default=None, help="directory (default: made in the cache)")
    a("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    a("--tokens", nargs="+", type=int, default=[2048, 8192, 16384, 32768], help="prompt lengths")
    a("--mbit", nargs="+", type=float, default=[10, 80, 1000], help="links, in Mbit/s")
    a("--rounds", type=int, default=3, help="of all layouts, alternating (default: 3)")
    a("--warm-up", nargs="+", type=int, default=[512, 1536], help="prompts that are not counted")
    a("--chunk", type=int, default=512, help="most tokens a chunk (default: 512)")
    a(
        "--dtype",
        choices=ITEM_BYTES,
        default="float32",
        help="bfloat16 where the processor multiplies it (default: float32)",
    )
    a("--chunk-mode", choices=["adaptive", "fixed"], default="adaptive")
    a("--kv-memory", type=int, default=6 * 2**30, help="of a decode worker, bytes (default: 6 GiB)")
    a("--output", type=Path, default=RESULTS / "pp_vs_tp.json", help="results, with hardware")
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("network namespaces need root: run this as root")
    end_on_sigterm()
    args.model = args.model or ensure_model()
    report = Report(args.output)
    with links(max(LAYOUTS[name].workers for name in args.layouts)) as made:
        enter(CLIENT)
        samples = asyncio.run(measure(made, args, report))
    rows = results(samples, args)
    print(report_table(rows))
    args.output.with_suffix(".svg").write_text(plot(rows, args))
    report.write(rows=rows)


if __name__ == "__main__":
    main()
