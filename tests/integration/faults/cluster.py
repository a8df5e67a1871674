"""A service of real processes, started by `penstock up`, with what a fault test asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from penstock_operator.local.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

PAGE_SIZE = 16
CHUNK = 64
CONTEXT = 8192
_NAME = "faults"
_POLL_SECONDS = 0.03


@dataclass(frozen=True)
class Pod:
    """One process, as the supervisor reports it."""

    name: str
    role: str
    pid: int | None
    started: int | None
    http: str
    state: str


class Cluster:
    """A running service. Commands are blocking; everything over HTTP is a coroutine."""

    def __init__(self, folder: Path, model: Path, *, dtype: str, decodes: int, ranks: int) -> None:
        self.state = StateDir(folder / "state", _NAME)
        self.decodes = decodes
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._root = folder / "state"
        self._output = folder / "up.log"
        self._manifest = folder / "service.yaml"
        self._manifest.write_text(yaml.safe_dump(_manifest(model, dtype, decodes, ranks)))
        self.supervisor: subprocess.Popen[bytes] | None = None

    # --- life -----------------------------------------------------------------------------------

    def up(self) -> None:
        """Start the supervisor, in the foreground of a process of its own, unless it runs."""
        if self.supervisor is not None and self.supervisor.poll() is None:
            return
        with self._output.open("wb") as output:
            self.supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-m", "penstock_operator.cli", "up", "--grace", "30"),
                    *("-f", str(self._manifest), "--port", str(self.port)),
                    *("--state-dir", str(self._root)),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def down(self) -> int:
        """Run `penstock down`; return its exit code."""
        command = [sys.executable, "-m", "penstock_operator.cli", "down", "--grace", "30"]
        return subprocess.run(
            [*command, "--state-dir", str(self._root)], check=False, timeout=60
        ).returncode

    def finish(self) -> None:
        """End whatever a failed test has left."""
        if self.supervisor is None or self.supervisor.poll() is not None:
            return
        self.supervisor.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        self.supervisor.send_signal(signal.SIGTERM)
        try:
            self.supervisor.wait(15)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()

    def story(self) -> str:
        """Return the end of what was printed, for a failure's report."""
        return self._output.read_text(errors="replace")[-6000:]

    # --- processes ------------------------------------------------------------------------------

    def pods(self) -> dict[str, Pod]:
        """Return the processes by name."""
        listed = self.state.read(self.state.pods_file) or []
        keys = Pod.__dataclass_fields__
        return {p["name"]: Pod(**{key: p[key] for key in keys}) for p in listed}

    def pid(self, name: str) -> int:
        """Return the pid of a process that runs."""
        pid = self.pods()[name].pid
        assert pid is not None, f"{name} does not run"
        return pid

    def signal(self, name: str, number: signal.Signals) -> int:
        """Send a signal to a process; return its pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def ranks(self, name: str) -> list[int]:
        """Return the pids of a worker's other ranks."""
        return [child.pid for child in psutil.Process(self.pid(name)).children()]

    def log(self, name: str) -> str:
        """Return what a process has printed."""
        return self.state.log_file(name).read_text(errors="replace")

    def cuts(self) -> list[list[int]]:
        """Return the tokens delivered by remote prefills that were cut short so far.

        Of each decode worker by itself, in order of time.
        """
        found = (
            re.findall(r"was cut at token (\d+)", self.log(f"decode-{i}"))
            for i in range(self.decodes)
        )
        return [[int(token) for token in tokens] for tokens in found]

    async def replaced(self, name: str, old: int) -> None:
        """Return when another process is ready in the place of `old`."""

        async def check() -> bool:
            pod = self.pods().get(name)
            return pod is not None and pod.state == "ready" and pod.pid not in (None, old)

        await eventually(check, f"a successor of {name} to be ready")

    # --- over HTTP ------------------------------------------------------------------------------

    def client(self) -> httpx.AsyncClient:
        """Return a client of the API; close it."""
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=8)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits, trust_env=False)

    async def worker(self, name: str) -> dict[str, Any]:
        """Return a worker's /state. Raises httpx.HTTPError while it does not answer."""
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            found: dict[str, Any] = (
                await client.get(f"http://{self.pods()[name].http}/state")
            ).json()
            return found

    async def ready(self) -> None:
        """Return when every process is ready, and a request would succeed end to end."""

        async def check() -> bool:
            if self.supervisor is not None and self.supervisor.poll() is not None:
                raise AssertionError(f"`penstock up` has ended:\n{self.story()}")
            pods = self.pods()
            if len(pods) != self.decodes + 3 or any(p.state != "ready" for p in pods.values()):
                return False
            async with self.client() as client:
                if (await client.get("/ready", timeout=5)).status_code != 200:
                    return False
            states = [await self.worker(f"decode-{i}") for i in range(self.decodes)]
            return all(state["groups_ready"] for state in states)

        await eventually(check, "the service to be ready", seconds=120)

    async def settled(self) -> None:
        """Return when the service has healed and every page is free or cached: conservation."""
        await self.ready()

        async def check() -> bool:
            names = [f"decode-{i}" for i in range(self.decodes)] + ["prefill-0-0"]
            pages = [(await self.worker(name))["pages"] for name in names]
            held = [p["granted"] + p["quarantined"] + p["resident"] for p in pages]
            if any(held):
                return False
            assert all(p["free"] + p["cached"] == p["total"] for p in pages), pages
            return True

        await eventually(check, "every page to be free or cached")


def _manifest(model: Path, dtype: str, decodes: int, ranks: int) -> dict[str, Any]:
    return {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": _NAME},
        "spec": {
            "model": {"uri": model.as_uri(), "name": "tiny", "dtype": dtype},
            "kvCache": {"memory": "48Mi", "pageSize": PAGE_SIZE},
            "prefill": {
                "pipelineParallel": 2,
                "tensorParallel": ranks,
                "chunkedPrefill": {"mode": "fixed", "maxTokens": CHUNK},
            },
            # Longer than a stage's restart on a busy machine: prompts resume in the group.
            "decode": {
                "replicas": decodes,
                "tensorParallel": ranks,
                "extraArgs": ["--group-wait-seconds", "60"],
            },
        },
    }


async def eventually(
    condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 60.0
) -> None:
    """Return when a condition of other processes holds; they cannot be awaited.

    A process that does not answer counts as a condition that does not hold.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError, KeyError):
            if await condition():
                return
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        await asyncio.sleep(_POLL_SECONDS)


def gone(pid: int) -> bool:
    """Whether no such process lives; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def service(
    folder: Path, model: Path, *, dtype: str = "float32", decodes: int = 2, ranks: int = 1
) -> Iterator[Cluster]:
    """Yield a service that is not started yet; end it with the context."""
    cluster = Cluster(folder, model, dtype=dtype, decodes=decodes, ranks=ranks)
    try:
        yield cluster
    finally:
        cluster.finish()
