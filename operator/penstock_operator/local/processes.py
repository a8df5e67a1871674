"""One process: started under the shim, its output cut into lines, ended with grace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from penstock_operator.local.logs import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SHIM = Path(__file__).with_name("exec_shim.py")
_DRAIN_SECONDS = 1.0
"""How long output may still come after the end, from children that hold the pipe open."""


class Process:
    """A running program. It dies with this process, also when that one is killed.

    Start it from the main thread only, see `exec_shim`.
    """

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self.pid = process.pid
        self.started = start_time(process.pid)
        """With the pid it names the process for good: pids are used again."""
        self.last_line = ""
        self._process = process
        self._on_line = on_line
        self._output = asyncio.create_task(self._read_output())

    @classmethod
    async def start(
        cls, argv: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]
    ) -> Process:
        """Start `argv` in a session of its own; every line it prints goes to `on_line`.

        A program that cannot be run ends with code 127 and says why.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_SHIM),
            str(os.getpid()),
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        return cls(process, on_line)

    async def wait(self) -> int:
        """Wait for the end and for the last output; return the exit code, -N for signal N.

        What the process left behind in its session's group is killed.
        """
        code = await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(asyncio.shield(self._output), _DRAIN_SECONDS)
        except TimeoutError:
            self._output.cancel()
        return code

    def terminate(self) -> None:
        """Ask it to drain and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it, and everything it started, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _read_output(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        lines = LineSplitter()
        while data := await stream.read(65536):
            self._emit(lines.feed(data))
        self._emit(lines.finish())

    def _emit(self, lines: list[str]) -> None:
        for line in lines:
            if line.strip():
                self.last_line = line.strip()
            self._on_line(line)


def exit_reason(code: int, last_line: str) -> str:
    """Return how a process ended, in words, with its last line."""
    if code < 0:
        try:
            how = f"killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"killed by signal {-code}"
    else:
        how = f"exit code {code}"
    return f"{how}: {last_line}" if last_line else how


def start_time(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def kill_leftover(pid: int, started: int) -> bool:
    """Kill the process group of a process that outlived its supervisor; return whether it was."""
    if start_time(pid) != started:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return True
