"""What the benchmarks share: the machine, spreads, tables, result files. Standard library only.

Both environments import it, ours and the other engine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
RESULTS = HERE / "results"

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Those that decide how fast a matrix product is."""
FIRST_TOKEN, LAST_TOKEN = 3, 8000
"""Prompts are drawn from these ids: no special token among them."""


def say(text: str) -> None:
    """Print a line of progress, with the time of day."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what was started is ended."""

    def end(*_: object) -> None:
        # Who ends a whole group signals us twice if a launcher passes signals on.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit("ended by SIGTERM")

    signal.signal(signal.SIGTERM, end)


# --- the machine ------------------------------------------------------------------------------


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def load_average() -> float:
    """Return how many processes ran or waited in the last minute."""
    return os.getloadavg()[0]


def hardware() -> dict[str, Any]:
    """Return what a reader needs to know of the machine to compare with theirs."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(_split(line) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "family_model": [fields.get("cpu family"), fields.get("model")],
        "cores": cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def busy_seconds() -> float:
    """Return the core-seconds that all processes have used since the machine started.

    And those that it did not get, see `stolen_seconds`.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = _core_seconds()
    return user + nice + system + irq + softirq + steal


def stolen_seconds() -> float:
    """Return the core-seconds in which a virtual machine wanted to run and its host let others.

    Since it started. 0 where the host does not tell.
    """
    return _core_seconds()[7]


def _core_seconds() -> list[float]:
    words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    return [int(word) / os.sysconf("SC_CLK_TCK") for word in words[:8]]


def group_cpu_seconds(*groups: int) -> float:
    """Return the core-seconds of the processes of some process groups."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        # The name, in brackets, may hold anything.
        try:
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if int(fields[2]) in groups:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def end_group(process: subprocess.Popen[Any], patience: float) -> None:
    """Ask a process that leads its group to end; what is left of the group then is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(file: Path) -> str:
    """Return the end of a log, to tell with an error."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_calm(seconds: float) -> None:
    """Wait until other processes take less than a tenth of the cores, at most so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < 0.1 * cores():
            return


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in MiB."""

    rss: float
    pss: float
    """Pages shared with other processes count in part: sums over processes are right."""


def process_memory(pid: int) -> Memory:
    """Return a process's memory. Raises OSError if it is gone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    fields = dict(_split(line) for line in text.splitlines()[1:])
    rss, pss = (int(fields[name].removesuffix(" kB")) / 1024 for name in ("Rss", "Pss"))
    return Memory(round(rss, 1), round(pss, 1))


# --- prompts and numbers ----------------------------------------------------------------------


def prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Return random token ids; the same for the same seed and length.

    Prompts of another length begin otherwise, so that none is found in part in a cache.
    """
    rng = random.Random(f"{seed}, {length} tokens")
    return [[rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)] for _ in range(count)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent of at least two values do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True, slots=True)
class Spread:
    """Several samples of one quantity."""

    minimum: float
    median: float
    maximum: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1], len(ordered))

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Return `median (minimum to maximum)`."""
        low, middle, high = (
            f"{value * scale:,.{digits}f}" for value in (self.minimum, self.median, self.maximum)
        )
        return f"{middle} ({low} to {high})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, aligned so that it also reads well on a terminal."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


# --- results ----------------------------------------------------------------------------------


class Report:
    """What one run measured, as a JSON file: written after every step, so a crash loses little."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.monotonic()
        self.content: dict[str, Any] = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "hardware": hardware(),
            "load_average_at_start": load_average(),
        }

    def write(self, **content: Any) -> None:
        """Add or replace top-level fields, and write the file."""
        self.content |= content
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        self.content["load_average_at_end"] = load_average()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1, default=_jsonable)
        self.path.write_text(text + "\n", encoding="utf-8")


def _jsonable(value: object) -> object:
    if isinstance(value, Spread | Memory):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} in a report")


def _commit() -> str:
    """Return the commit that is checked out, with a + if files differ from it; "" outside git."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")
