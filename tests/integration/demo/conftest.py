"""`penstock up` without a manifest, as a newcomer runs it, once for all tests here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[3]


@dataclass
class Demo:
    """The running demo."""

    url: str
    state: Path

    def penstock(self, *arguments: str) -> str:
        """Run a command of `penstock` against it and return what it printed."""
        command = [sys.executable, "-m", "penstock_operator.cli", *arguments]
        run = subprocess.run(
            [*command, "--state-dir", str(self.state)],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return run.stdout


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    demo = Demo(f"http://127.0.0.1:{port}", folder / "state")
    command = [sys.executable, "-m", "penstock_operator.cli", "up", "--port", str(port)]
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [*command, "--state-dir", str(demo.state)], stdout=log, stderr=log, cwd=folder
        )
        try:
            _wait_until_ready(demo.url, up, folder / "up.log")
            yield demo
        finally:
            up.send_signal(signal.SIGINT)
            try:
                code = up.wait(60)
            except subprocess.TimeoutExpired:
                up.kill()
                raise
    assert code in {0, 130}, (folder / "up.log").read_text()
    assert not _left_behind(demo.state), "processes were left behind"


def _wait_until_ready(url: str, up: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert up.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"the demo was not ready in 150 s:\n{log.read_text()}")


def _left_behind(state: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if str(state) in line and int(process.name) != os.getpid():
            found.append(line)
    return found


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """The language that the demo was trained on: its words and sentence forms."""
    file = ROOT / "runtime/demo/language.py"
    spec = importlib.util.spec_from_file_location("demo_language", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_language"] = module
    spec.loader.exec_module(module)
    return module


def load(text: str) -> Any:
    """Parse JSON."""
    return json.loads(text)
