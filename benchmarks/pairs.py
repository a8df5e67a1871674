"""Engines measured in turn: one sample each, the others idle meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from common import Spread, busy_seconds, cores, stolen_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

IDLE_TIMEOUT = 30


class Engine(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """As errors tell it."""
        ...

    def cpu_seconds(self) -> float:
        """Return the core-seconds that its processes have used up."""
        ...


E = TypeVar("E", bound=Engine)


def take_pair(
    engines: Mapping[str, E], order: Sequence[str], sample: Callable[[E], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Take one sample with each engine, in `order`, and note in each who had the cores.

    Of the sample's time, as numbers of cores: `cores` the engine itself, `idle_engine_cores` the
    others, `client_cores` this process, `stolen_cores` the host of this virtual machine, and
    `other_cores` all else.
    """
    pair = {}
    for name in order:
        for engine in engines.values():
            wait_until_idle(engine)
        before = {n: engine.cpu_seconds() for n, engine in engines.items()}
        busy, stolen, client = busy_seconds(), stolen_seconds(), time.process_time()
        started = time.perf_counter()
        taken = sample(engines[name])
        wall = time.perf_counter() - started
        used = {n: (engine.cpu_seconds() - before[n]) / wall for n, engine in engines.items()}
        others = (busy_seconds() - busy) / wall - sum(used.values())
        taken["client_cores"] = (time.process_time() - client) / wall
        taken["stolen_cores"] = (stolen_seconds() - stolen) / wall
        taken["cores"] = used.pop(name)
        taken["idle_engine_cores"] = sum(used.values())
        taken["other_cores"] = max(0.0, others - taken["client_cores"] - taken["stolen_cores"])
        pair[name] = taken
    return pair


def cores_taken(samples: Iterable[dict[str, Any]]) -> str:
    """Tell what some samples of `take_pair` did not get."""
    taken = list(samples)
    others, host = (
        Spread.of(sample[key] for sample in taken).text(2)
        for key in ("other_cores", "stolen_cores")
    )
    return f"of {cores()} cores other processes took {others}, the host {host}"


def wait_until_idle(engine: Engine) -> None:
    """Wait until it leaves the cores alone: vLLM's processes spin for a second after work."""
    deadline = time.monotonic() + IDLE_TIMEOUT
    while time.monotonic() < deadline:
        before = engine.cpu_seconds()
        time.sleep(0.3)
        if engine.cpu_seconds() - before < 0.02:
            return
    raise SystemExit(f"{engine.name} still used the cores {IDLE_TIMEOUT} s after its last answer")
