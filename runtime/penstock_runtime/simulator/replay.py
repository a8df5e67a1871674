"""A few prompts through one group: all at once, or each when the one before it is ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.simulator.clock import Clock
from penstock_runtime.simulator.group import PrefillGroup, request, unlike_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.timeline import StepSpan
    from penstock_runtime.scheduler.prefill import PrefillRequest
    from penstock_runtime.simulator.group import Scheduler
    from penstock_runtime.simulator.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Replay:
    """Simulated. Seconds."""

    ready: list[float]
    """When the KV of each prompt was with its receiver."""
    spans: list[StepSpan]
    """Empty unless they were to be recorded."""
    busy: list[float]
    """Computed, a stage."""
    steps: int

    @property
    def makespan(self) -> float:
        """Until the last prompt was ready."""
        return max(self.ready)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they idled."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan)


def replay(
    scheduler: Scheduler,
    hardware: Hardware,
    prompts: Sequence[int],
    *,
    page_size: int,
    in_turn: bool = False,
    record: bool = False,
    seed: int = 0,
) -> Replay:
    """Send prompts of these lengths through a group; nothing of one is in another's.

    in_turn: each is sent when the one before it is ready; otherwise all are sent at once.
    """
    clock = Clock()
    ready = [0.0] * len(prompts)

    def send(number: int) -> None:
        group.add(request(number, unlike_tokens(number, prompts[number]), page_size))

    def on_ready(done: PrefillRequest, time: float) -> None:
        ready[done.grant] = time
        if in_turn and done.grant + 1 < len(prompts):
            send(done.grant + 1)

    group = PrefillGroup(
        clock,
        scheduler,
        hardware,
        page_size=page_size,
        on_ready=on_ready,
        record=record,
        seed=seed,
    )
    for number in range(1 if in_turn else len(prompts)):
        send(number)
    clock.run()
    group.check_idle()
    return Replay(ready, group.spans, group.busy_seconds, group.steps)
