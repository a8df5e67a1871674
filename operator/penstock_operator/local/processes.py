"""One process: started under the shim, its output cut into lines, ended with grace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from penstock_operator.local.logs import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    OnLine: TypeAlias = Callable[[str], None]

_SHIM = Path(__file__).with_name("exec_shim.py")
_DRAIN_SECONDS = 1.0
"""How long output may still come after the end, from children that hold the pipe open."""


class Process:
    """A running program. It dies with this process, also when that one is killed.

    Belongs to one event loop, in the main thread (see `exec_shim`). asyncio's own subprocesses are
    not used, because their `wait` lasts until every holder of the output pipe has ended, and a
    crashed program's children may hold it for ever.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_line: OnLine,
        inherits: Sequence[int] = (),
    ) -> None:
        """Start `argv` in a session of its own; every line it prints goes to `on_line`.

        The file descriptors in `inherits` stay open in it, under their numbers.
        A program that cannot be run ends with code 127 and says why.
        """
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            pass_fds=inherits,
        )
        self.pid = self._popen.pid
        self.started = start_time(self.pid)
        """With the pid it names the process for good: pids are used again."""
        self.last_line = ""
        self._on_line = on_line
        self._lines = LineSplitter()
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._silent: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)
        assert self._popen.stdout is not None
        self._output = self._popen.stdout
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output, self._read_output)

    async def wait(self) -> int:
        """Wait for the end and for the last output; return the exit code, -N for signal N.

        What the process left behind in its group is killed.
        """
        code = await asyncio.shield(self._exited)
        await asyncio.wait([self._silent], timeout=_DRAIN_SECONDS)
        self._close_output()
        return code

    def terminate(self) -> None:
        """Ask it to drain and end."""
        if not self._exited.done():
            self._popen.terminate()

    def kill(self) -> None:
        """End it, and everything it started, now."""
        if not self._exited.done():
            os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        """The process has ended; until it is reaped nobody else can have its pid or group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._exited.set_result(self._popen.wait())

    def _read_output(self) -> None:
        try:
            data = os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return
        if data:
            self._emit(self._lines.feed(data))
        else:
            self._close_output()

    def _close_output(self) -> None:
        if self._silent.done():
            return
        self._silent.set_result(None)
        self._loop.remove_reader(self._output)
        self._output.close()
        self._emit(self._lines.finish())

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
