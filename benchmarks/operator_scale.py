"""Measures the operator with many services on a real API server, without a container.

etcd and the API server run here too, so the operator is held to one core and they have the rest.
Without `--controllers` only the garbage collector runs, and nobody makes pods of the workloads;
with it, pods exist and stay pending.

  cold        from the start of the operator, which finds all services new, until every one of them
              has all its objects and its status
  resync      a complete comparison in which nothing has changed
  change      from the write of one spec to the status of the new generation, which the operator
              writes after it has applied the objects; services one after the other
  burst       the same for all services at once, until the last one is done
  idle        CPU and API calls of half a minute without a change
  warm        a new operator with everything there: until it has read and compared it all
  soak        with --soak: --rate changes a second, services coming and going, RSS every 10 s

CPU and memory are the operator's process alone, API calls are counted by the operator itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from common import RESULTS, Report, Spread, cores, end_on_sigterm, process_memory, say, table
from control_plane import OPERATOR, control_plane, find_programs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from control_plane import ControlPlane

SERVICES = "/apis/penstock.dev/v1alpha1/namespaces/default/inferenceservices"
IDLE_SECONDS = 30.0
DEADLINE_SECONDS = 600.0
SAMPLE_SECONDS = 10.0
_CALL = re.compile(
    r'penstock_operator_api_calls_total\{code="\d+",resource="(\S+)",verb="(\w+)"\} '
)


class Client:
    """The API server, as an administrator sees it."""

    def __init__(self, plane: ControlPlane, session: aiohttp.ClientSession) -> None:
        config = json.loads(plane.kubeconfig("admin").read_text(encoding="utf-8"))
        self._base = config["clusters"][0]["cluster"]["server"]
        token = config["users"][0]["user"]["token"]
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session = session

    async def call(self, method: str, path: str, body: Any = None, kind: str = "json") -> Any:
        """Return the answer. Raises RuntimeError for one that is no success."""
        headers = {**self._headers, "Content-Type": f"application/{kind}"}
        data = None if body is None else json.dumps(body)
        async with self._session.request(
            method, self._base + path, data=data, headers=headers, ssl=False
        ) as response:
            text = await response.text()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {text[:300]}")
            return json.loads(text)

    async def create(self, name: str) -> None:
        """Create a service: a pipeline of two stages, two decode workers, autoscaled router."""
        spec = {
            "model": {"uri": "hf://Qwen/Qwen3-8B"},
            "prefill": {"replicas": 1, "pipelineParallel": 2},
            "decode": {"replicas": 2},
        }
        kind = {"apiVersion": "penstock.dev/v1alpha1", "kind": "InferenceService"}
        await self.call("POST", SERVICES, {**kind, "metadata": {"name": name}, "spec": spec})

    async def change(self, name: str, value: int) -> int:
        """Change an argument of the decode workers, so that they get a new revision."""
        patch = {"spec": {"decode": {"extraArgs": [f"--max-batch={value}"]}}}
        found = await self.call("PATCH", f"{SERVICES}/{name}", patch, "merge-patch+json")
        return int(found["metadata"]["generation"])

    async def delete(self, name: str) -> None:
        """Delete a service."""
        await self.call("DELETE", f"{SERVICES}/{name}")

    async def waiting(self) -> int:
        """Return how many services have no status of their newest generation."""
        found = await self.call("GET", SERVICES)
        return sum(
            item.get("status", {}).get("observedGeneration") != item["metadata"]["generation"]
            for item in found["items"]
        )

    async def done(self, name: str, generation: int) -> bool:
        """Whether a service has the status of a generation."""
        found = await self.call("GET", f"{SERVICES}/{name}")
        return bool(found.get("status", {}).get("observedGeneration") == generation)


@dataclass(frozen=True)
class Usage:
    """What one phase took."""

    seconds: float
    cpu_seconds: float
    rss_mib: float
    api_calls: dict[str, int]

    def row(self, name: str, services: int) -> list[str]:
        """Return the phase's line of the table."""
        calls = sum(self.api_calls.values())
        return [
            name,
            f"{self.seconds:.1f}",
            f"{self.cpu_seconds:.1f}",
            f"{self.rss_mib:.0f}",
            str(calls),
            f"{calls / services:.1f}",
        ]


class Operator:
    """The process that is measured."""

    def __init__(
        self, plane: ControlPlane, session: aiohttp.ClientSession, log: Path, core: int
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._session = session
        program = "from penstock_operator.cluster.main import main; main()"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", program),
                    *("--kubeconfig", str(plane.kubeconfig(OPERATOR))),
                    *("--http", f"127.0.0.1:{self._port}", "--resync-seconds", "3600"),
                ],
                stdout=output,
                stderr=output,
            )
        os.sched_setaffinity(self._process.pid, {core})
        self._mark: tuple[float, float, Counter[str]] = (time.monotonic(), 0.0, Counter())

    async def metrics(self) -> str:
        """Return /metrics, empty while it does not answer."""
        if self._process.poll() is not None:
            raise RuntimeError("the operator has ended; see its log")
        try:
            async with self._session.get(f"http://127.0.0.1:{self._port}/metrics") as response:
                return await response.text()
        except aiohttp.ClientError:
            return ""

    async def value(self, name: str) -> float:
        """Return one number, -1 while it does not answer."""
        found = re.search(rf"^penstock_operator_{name} (\S+)$", await self.metrics(), re.MULTILINE)
        return float(found[1]) if found else -1.0

    async def start_phase(self) -> None:
        """Begin to count."""
        self._mark = (time.monotonic(), self.cpu_seconds(), await self._calls())

    async def end_phase(self) -> Usage:
        """Return what was used since the phase began."""
        began, cpu, calls = self._mark
        return Usage(
            seconds=round(time.monotonic() - began, 2),
            cpu_seconds=round(self.cpu_seconds() - cpu, 2),
            rss_mib=self.rss(),
            api_calls=dict(await self._calls() - calls),
        )

    async def _calls(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for line in (await self.metrics()).splitlines():
            if (found := _CALL.match(line)) and found[1] != "leases":
                counted[f"{found[2]} {found[1]}"] += int(float(line.rpartition(" ")[2]))
        return counted

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        words = stat.rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        """Return the resident memory, in MiB."""
        return process_memory(self._process.pid).rss

    def end(self) -> None:
        """End it and wait."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.asynccontextmanager
async def operator(
    plane: ControlPlane, session: aiohttp.ClientSession, core: int
) -> AsyncIterator[Operator]:
    """Run an operator."""
    running = Operator(plane, session, plane.folder / "operator.log", core)
    try:
        yield running
    finally:
        running.end()


async def until(what: str, check: Callable[[], Awaitable[bool]], every: float = 0.1) -> None:
    """Wait until `check` holds. Raises RuntimeError naming `what`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not await check():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {DEADLINE_SECONDS:.0f} s")
        await asyncio.sleep(every)


class Run:
    """One run of the benchmark."""

    def __init__(
        self, plane: ControlPlane, session: aiohttp.ClientSession, arguments: argparse.Namespace
    ) -> None:
        self._plane = plane
        self._session = session
        self._client = Client(plane, session)
        self._arguments = arguments
        self._names = [f"service-{number}" for number in range(arguments.services)]
        self._core = max(os.sched_getaffinity(0))
        self.phases: dict[str, Usage] = {}
        self.latencies: list[float] = []
        self.samples: list[dict[str, float]] = []

    async def everything(self) -> None:
        """Measure all phases."""
        say(f"creating {len(self._names)} services")
        for name in self._names:
            await self._client.create(name)
        async with operator(self._plane, self._session, self._core) as measured:
            await self._phase(measured, "cold", self._settled)
            await self._quiet(measured)
            await self._changes(measured)
            await self._quiet(measured)
            await measured.start_phase()
            await asyncio.gather(*(self._client.change(name, 10_000) for name in self._names))
            await until("the burst is worked off", self._settled, every=0.5)
            self.phases["burst"] = await measured.end_phase()
            await self._quiet(measured)
            await measured.start_phase()
            await asyncio.sleep(IDLE_SECONDS)
            self.phases["idle"] = await measured.end_phase()
        async with operator(self._plane, self._session, self._core) as measured:
            await self._phase(measured, "warm", lambda: self._all_known(measured))
            if self._arguments.soak:
                await self._soak(measured)

    async def _phase(
        self, measured: Operator, name: str, done: Callable[[], Awaitable[bool]]
    ) -> None:
        await until(f"the phase {name} is over", done, every=0.5)
        self.phases[name] = await measured.end_phase()
        say(f"{name}: {asdict(self.phases[name])}")

    async def _changes(self, measured: Operator) -> None:
        await measured.start_phase()
        for number, name in enumerate(self._names[: self._arguments.changes]):
            began = time.monotonic()
            generation = await self._client.change(name, number + 1)
            await until(
                f"{name} follows",
                lambda name=name, generation=generation: self._client.done(name, generation),  # type: ignore[misc]
                every=0.01,
            )
            self.latencies.append(time.monotonic() - began)
        self.phases["change"] = await measured.end_phase()
        say(f"change: median {statistics.median(self.latencies):.3f} s")

    async def _settled(self) -> bool:
        return await self._client.waiting() == 0

    async def _all_known(self, measured: Operator) -> bool:
        return (
            await measured.value("services") == len(self._names)
            and await measured.value("queue_depth") == 0
            and await measured.value("reconcile_seconds_count") >= len(self._names)
        )

    async def _quiet(self, measured: Operator) -> None:
        """Wait until three seconds have passed without a reconcile."""
        before = -1.0
        while (now := await measured.value("reconcile_seconds_count")) != before:
            before = now
            await asyncio.sleep(3)

    async def _soak(self, measured: Operator) -> None:
        """Change, delete and create services for a while, and follow the memory."""
        rng = random.Random(1)
        began = time.monotonic()
        end, sample, count = began + 60 * self._arguments.soak, began, 0
        names = list(self._names)
        while time.monotonic() < end:
            count += 1
            await self._one_change(rng, names, count)
            if time.monotonic() >= sample:
                sample += SAMPLE_SECONDS
                self.samples.append(
                    {
                        "seconds": round(time.monotonic() - began, 1),
                        "rss_mib": measured.rss(),
                        "cpu_seconds": round(measured.cpu_seconds(), 2),
                        "queue_age_seconds": await measured.value("queue_age_seconds"),
                        "changes": count,
                        "children": await measured.value("children"),
                    }
                )
            due = began + count / self._arguments.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        say(f"soak: {count} changes, RSS {self.samples[-1]['rss_mib']} MiB")

    async def _one_change(self, rng: random.Random, names: list[str], count: int) -> None:
        """Nine in ten change a service; the others replace one by a new one."""
        place = rng.randrange(len(names))
        if rng.random() < 0.9:
            await self._client.change(names[place], rng.randrange(1_000_000))
        else:
            await self._client.delete(names[place])
            names[place] = f"soak-{count}"
            await self._client.create(names[place])


def summary(run: Run, services: int) -> str:
    """Return the tables."""
    order = ("cold", "change", "burst", "idle", "warm")
    columns = ("phase", "seconds", "CPU s", "RSS MiB", "API calls", "a service")
    text = table(columns, [run.phases[name].row(name, services) for name in order])
    latency = Spread.of(run.latencies)
    slow = sorted(run.latencies)[int(0.95 * len(run.latencies))]
    text += f"\n\none change: {latency.text(3)} s, 95th percentile {slow:.3f} s"
    if run.samples:
        whole = [sample["rss_mib"] for sample in run.samples]
        third = max(1, len(whole) // 3)
        text += (
            f"\nsoak: RSS {statistics.mean(whole[:third]):.1f} MiB in the first third, "
            f"{statistics.mean(whole[third : 2 * third]):.1f} in the second, "
            f"{statistics.mean(whole[2 * third :]):.1f} in the last"
        )
    return text


async def measure(arguments: argparse.Namespace, plane: ControlPlane, report: Report) -> None:
    """Run everything, print the tables and write the report."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as session:
        run = Run(plane, session, arguments)
        try:
            await run.everything()
        finally:
            report.write(
                services=arguments.services,
                controllers=arguments.controllers,
                operator_cores=1,
                phases={name: asdict(usage) for name, usage in run.phases.items()},
                change_seconds=run.latencies,
                soak=run.samples,
            )
    print(summary(run, arguments.services))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--changes", type=int, default=50, help="single changes (default 50)")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of churn (default 0)")
    parser.add_argument(
        "--rate", type=float, default=20.0, help="changes a second of the soak (default 20)"
    )
    parser.add_argument("--controllers", action="store_true", help="run all controllers")
    parser.add_argument("--kubernetes", type=Path, help="folder of kube-apiserver")
    parser.add_argument("--crds", type=Path, help="folder of the CRDs (default: the tree's)")
    parser.add_argument("--output", type=Path, default=RESULTS / "operator_scale.json")
    arguments = parser.parse_args()
    end_on_sigterm()
    report = Report(arguments.output)
    crds = {"crds": arguments.crds} if arguments.crds else {}
    with (
        tempfile.TemporaryDirectory(prefix="operator-scale-") as folder,
        control_plane(
            Path(folder) / "plane",
            programs=find_programs(arguments.kubernetes),
            controllers=arguments.controllers,
            **crds,
        ) as plane,
    ):
        say(f"the API server runs; the operator gets 1 of {cores()} cores")
        asyncio.run(measure(arguments, plane, report))


if __name__ == "__main__":
    main()
