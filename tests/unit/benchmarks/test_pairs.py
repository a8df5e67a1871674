from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pairs
import pytest
from pairs import cores_taken, take_pair


@dataclass
class Engine:
    name: str
    used: float = 0.0

    def cpu_seconds(self) -> float:
        return self.used


@dataclass
class Machine:
    """Core-seconds of everything, and wall time that passes only when told."""

    now: float = 0.0
    busy: float = 0.0
    stolen: float = 0.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(pairs, "busy_seconds", lambda: machine.busy)
    monkeypatch.setattr(pairs, "stolen_seconds", lambda: machine.stolen)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(time, "process_time", lambda: 0.25 * machine.now)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return machine


def test_a_sample_tells_who_had_the_cores(machine: Machine) -> None:
    engines = {name: Engine(name) for name in ("one", "two")}

    def sample(engine: Engine) -> dict[str, Any]:
        machine.now += 2
        engine.used += 1
        if engine.name == "two":
            engines["one"].used += 0.2
        # Both engines, this process, the host and somebody else.
        machine.busy += 1 + (0.2 if engine.name == "two" else 0) + 0.5 + 0.4 + 0.6
        machine.stolen += 0.4
        return {"rate": 1.0}

    pair = take_pair(engines, ["two", "one"], sample)
    assert list(pair) == ["two", "one"]
    for name, idle in (("two", 0.1), ("one", 0.0)):
        assert pair[name] == {
            "rate": 1.0,
            "cores": pytest.approx(0.5),
            "idle_engine_cores": pytest.approx(idle),
            "client_cores": pytest.approx(0.25),
            "stolen_cores": pytest.approx(0.2),
            "other_cores": pytest.approx(0.3),
        }
    assert "other processes took 0.30 (0.30 to 0.30), the host 0.20" in cores_taken(pair.values())


def test_an_engine_that_does_not_rest_ends_the_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine("busy")

    def sleep(seconds: float) -> None:
        machine.now += seconds
        engine.used += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    with pytest.raises(SystemExit, match="busy still used the cores 30 s after its last answer"):
        pairs.wait_until_idle(engine)
