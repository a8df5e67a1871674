"""Hardware from published times: a fit of a whole model's costs to a few rows of a table.

The whole model's time of a step is split evenly among P stages, but for what every stage adds to
a step on its own (host, hand-over):

    t(L, x) = handover + (launch + gamma L + b hypot(x, saturation) + a (2 L x + x²)) / P

Five numbers are fitted (their logarithms, by the simplex method of Nelder and Mead, Computer
Journal 7, 1965) to the relative errors of the TTFTs of the rows named in the table, under the
published system's way to fill its pipeline. Everything else that is compared is predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.simulator.hardware import StageModel
from penstock_runtime.simulator.published import PROMPT
from penstock_runtime.simulator.published_rules import (
    DynamicRule,
    FixedRule,
    lengths,
    lock_step_makespan,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.simulator.published import Published, Row
    from penstock_runtime.simulator.published_rules import Rule

_STEPS = 400


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A whole model on one node, in seconds; see the head of this file."""

    launch: float
    handover: float
    gamma: float
    b: float
    a: float
    saturation: float

    def stage(self, stages: int) -> StageModel:
        """Return one of `stages` stages; a lone one hands nothing over."""
        handover = self.handover if stages > 1 else 0.0
        cost = Cost(
            c=handover + self.launch / stages,
            gamma=self.gamma / stages,
            b=self.b / stages,
            a=self.a / stages,
        )
        return StageModel(cost, self.saturation)


def rule_of(row: Row, stage: StageModel, smoothing: float) -> Rule:
    """Return how a row's prompts were cut."""
    return DynamicRule(row.chunk, smoothing, stage.cost) if row.dynamic else FixedRule(row.chunk)


def lock_step_ttft(costs: ModelCosts, row: Row, smoothing: float) -> float:
    """Return a row's TTFT under the published system's pipeline, in seconds."""
    stage = costs.stage(row.stages)
    chunks = lengths(rule_of(row, stage, smoothing), row.prompt)
    times = [stage.seconds([Chunk(start, length)]) for start, length in chunks]
    return lock_step_makespan(times, row.stages, row.stages)


def calibrate(published: Published) -> ModelCosts:
    """Fit the hardware to the table's calibrated rows."""
    rows = [published.row(stages, chunk, dynamic=False) for stages, chunk in published.calibrated]

    def costs(logarithms: list[float]) -> ModelCosts:
        launch, handover, gamma, b, a = (math.exp(x) for x in logarithms)
        return ModelCosts(launch, handover, gamma, b, a, published.saturation)

    def squares(logarithms: list[float]) -> float:
        tried = costs(logarithms)
        return sum(
            math.log(lock_step_ttft(tried, row, published.smoothing) / row.ttft) ** 2
            for row in rows
        )

    # 128K tokens take about a minute on one node, half of it attention.
    start = [0.05, 0.02, 0.4 / PROMPT, 25 / PROMPT, 25 / PROMPT**2]
    return costs(minimise(squares, [math.log(value) for value in start]))


def minimise(function: Callable[[list[float]], float], start: list[float]) -> list[float]:
    """Return a point where the function is small, by the simplex method; deterministic."""
    size = len(start)
    simplex = [start]
    simplex += [[x + (0.3 if i == j else 0.0) for j, x in enumerate(start)] for i in range(size)]
    ranked = sorted((function(point), point) for point in simplex)
    for _ in range(_STEPS):
        worst = ranked.pop()
        centre = [sum(point[j] for _, point in ranked) / size for j in range(size)]
        ranked.append(_better(function, worst, centre, ranked[0][0], ranked[-1][0]))
        if ranked[-1][0] >= worst[0]:
            best = ranked[0][1]
            shrunk = [[(x + y) / 2 for x, y in zip(p, best, strict=True)] for _, p in ranked]
            ranked = [(function(point), point) for point in shrunk]
        ranked.sort()
    return ranked[0][1]


def _better(
    function: Callable[[list[float]], float],
    worst: tuple[float, list[float]],
    centre: list[float],
    least: float,
    second_worst: float,
) -> tuple[float, list[float]]:
    """Return the worst point moved through the centre, further, or half-way to it."""

    def along(distance: float) -> tuple[float, list[float]]:
        point = [c + distance * (c - w) for c, w in zip(centre, worst[1], strict=True)]
        return function(point), point

    reflected = along(1.0)
    if reflected[0] < least:
        return min(reflected, along(2.0))
    if reflected[0] < second_worst:
        return reflected
    return along(-0.5)
