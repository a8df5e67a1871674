"""A local service of fake pods, driven through the command line as a person would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from penstock_operator import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAKE = Path(__file__).with_name("fake_pod.py")
DEADLINE_SECONDS = 45.0
"""Hangs are failures; a loaded machine is not."""


def eventually(what: str, check: Callable[[], Any]) -> Any:
    """Return the first true value of `check`; fail after the deadline saying what did not come."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"did not happen within {DEADLINE_SECONDS:.0f} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gone(pid: int) -> bool:
    """Whether no such process lives; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Local:
    """One service under test, its state in a directory of its own."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = directory / "state"
        self.port = free_port()
        self.manifest = directory / "service.yaml"
        self.model = directory / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
        self.name = "test"
        self._capsys = capsys
        self._started: list[subprocess.Popen[str]] = []
        self.write()

    def write(self, **spec: Any) -> None:
        """Write the manifest: two prefill stages, one decode worker, with `spec` over it."""
        manifest = {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": self.name},
            "spec": {
                "model": {"uri": self.model.as_uri(), "name": "tiny"},
                "prefill": {"pipelineParallel": 2},
                **spec,
            },
        }
        self.manifest.write_text(yaml.safe_dump(manifest))

    def up_arguments(self, *options: str) -> list[str]:
        program = [sys.executable, "-S", "-E", str(FAKE)]
        return [
            "up", "-f", str(self.manifest), "--state-dir", str(self.root),
            "--port", str(self.port),
            "--program", f"penstock-worker={json.dumps([*program, 'worker'])}",
            "--program", f"penstock-router={json.dumps([*program, 'router'])}",
            *options,
        ]  # fmt: skip

    def up(self, *options: str) -> subprocess.Popen[str]:
        """Start the supervisor in the foreground of a process of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock_operator.cli", *self.up_arguments(*options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a command here; return its exit code and all it printed."""
        self._capsys.readouterr()
        code = cli.main([*arguments, "--state-dir", str(self.root)])
        out, err = self._capsys.readouterr()
        return code, out + err

    def resource(self) -> dict[str, Any]:
        """Return what `get -o json` says, {} when the service does not run."""
        code, out = self.run("get", "--name", self.name, "-o", "json")
        return json.loads(out) if code == 0 else {}

    def condition(self, kind: str) -> dict[str, Any]:
        conditions = self.resource().get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def is_ready(self) -> bool:
        return self.condition("Ready").get("status") == "True"

    def is_settled(self) -> bool:
        return self.is_ready() and self.condition("Progressing").get("status") == "False"

    def pods(self) -> list[dict[str, Any]]:
        code, out = self.run("ps", "-o", "json")
        return json.loads(out) if code == 0 else []

    def pids(self) -> dict[str, int]:
        return {pod["name"]: pod["pid"] for pod in self.pods() if pod["pid"] is not None}

    def wait_ready(self) -> None:
        eventually("the service is ready and settled", self.is_settled)

    def finish(self) -> None:
        """End whatever a failed test has left."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Local]:
    service = Local(tmp_path, capsys)
    yield service
    service.finish()


def wait_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the supervisor's end; return its exit code and output."""
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, out


def alive(pids: dict[str, int]) -> list[str]:
    return [name for name, pid in pids.items() if not gone(pid)]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)
