"""Simulate a published pipeline, then Penstock's scheduler on the same modelled hardware.

1. Fit the hardware to a few published times to first token (see `simulator.calibration`).
2. Predict all other rows of the table, throughputs and longer prompts included, by simulating the
   published system's rules; state the errors.
3. Put Penstock's scheduler, the code that serves, on that hardware.

Every figure is simulated. Seconds of a CPU, no GPU, no torch:

    python benchmarks/simulate_published.py --json results.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk
from penstock_runtime.simulator.calibration import ModelCosts, calibrate, rule_of
from penstock_runtime.simulator.group import scheduler_for
from penstock_runtime.simulator.hardware import Hardware
from penstock_runtime.simulator.published import DEEPSEEK, PROMPT, PROMPTS, QWEN, Published, Row
from penstock_runtime.simulator.published_rules import LockStepScheduler
from penstock_runtime.simulator.replay import Replay, replay
from penstock_runtime.simulator.report import table

PAGE = 64
LEAST_CHUNK = 512
"""Tokens: Penstock's setting for GPUs, `ChunkSettings.saturation_tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One row, simulated as published."""

    row: Row
    calibrated: bool
    ttft: float
    throughput: float | None

    @property
    def ttft_error(self) -> float:
        """Relative."""
        return self.ttft / self.row.ttft - 1

    @property
    def throughput_error(self) -> float | None:
        """Relative; None where no throughput was published."""
        if self.throughput is None or self.row.throughput is None:
            return None
        return self.throughput / self.row.throughput - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """What one way to run a layout reaches. Speed-ups are over one stage's throughput."""

    ttft: float
    back_to_back: float
    in_turn: float
    bubble: float
    """Of the prompts back to back."""
    steps: int
    """Of the lone prompt."""


def published_way(published: Published, costs: ModelCosts, row: Row, prompts: list[int]) -> Replay:
    """Run prompts by the published system's rules."""
    stage = costs.stage(row.stages)
    rule = rule_of(row, stage, published.smoothing)
    hardware = Hardware.uniform(row.stages, stage)
    return replay(LockStepScheduler(row.stages, rule), hardware, prompts, page_size=PAGE)


def compare(published: Published, costs: ModelCosts) -> list[Compared]:
    """Simulate every row of a table."""
    found: list[Compared] = []
    for row in published.rows:
        calibrated = not row.dynamic and (row.stages, row.chunk) in published.calibrated
        throughput = None
        if row.throughput is not None:
            queue = published_way(published, costs, row, [row.prompt] * PROMPTS)
            throughput = PROMPTS * row.prompt / queue.makespan
        ttft = published_way(published, costs, row, [row.prompt]).makespan
        found.append(Compared(row=row, calibrated=calibrated, ttft=ttft, throughput=throughput))
    return found


def penstock_way(
    costs: ModelCosts,
    stages: int,
    most: int,
    prompts: list[int],
    *,
    in_turn: bool = False,
    learn: bool = True,
    noise: float = 0.0,
) -> Replay:
    """Run prompts by Penstock's scheduler, chunks of at most `most` tokens.

    learn: it starts with the true coefficients but for a third, and fits them as it goes; it never
    knows the saturation of the linear layers.
    """
    stage = costs.stage(stages)
    believed = replace(stage.cost, c=stage.cost.c / 1.5, b=stage.cost.b * 1.5)
    pages = sum(-(-prompt // PAGE) for prompt in prompts)
    settings = ChunkSettings(max_tokens=most, saturation_tokens=LEAST_CHUNK)
    scheduler = scheduler_for(
        [believed if learn else stage.cost] * stages, PagePool(pages, PAGE), settings, learn=learn
    )
    hardware = Hardware.uniform(stages, stage, noise=noise)
    return replay(scheduler, hardware, prompts, page_size=PAGE, in_turn=in_turn)


def reach(costs: ModelCosts, stages: int, most: int, one_stage: float) -> Reached:
    """Return what Penstock reaches; `one_stage` in tokens a second."""
    lone = penstock_way(costs, stages, most, [PROMPT] * 2, in_turn=True)
    queue = penstock_way(costs, stages, most, [PROMPT] * PROMPTS)
    turns = penstock_way(costs, stages, most, [PROMPT] * PROMPTS, in_turn=True)
    tokens = PROMPTS * PROMPT
    return Reached(
        # Of the second: the first one was spent on learning.
        ttft=lone.ready[1] - lone.ready[0],
        back_to_back=tokens / queue.makespan / one_stage,
        in_turn=tokens / turns.makespan / one_stage,
        bubble=queue.bubble,
        steps=lone.steps // 2,
    )


def published_reach(published: Published, costs: ModelCosts, row: Row, one_stage: float) -> Reached:
    """Return what the published rules reach in the simulation."""
    lone = published_way(published, costs, row, [PROMPT])
    queue = published_way(published, costs, row, [PROMPT] * PROMPTS)
    tokens = PROMPTS * PROMPT
    return Reached(
        ttft=lone.makespan,
        back_to_back=tokens / queue.makespan / one_stage,
        in_turn=PROMPT / lone.makespan / one_stage,
        bubble=queue.bubble,
        steps=lone.steps,
    )


def limits(costs: ModelCosts, stages: int, one_stage: float) -> tuple[float, float, float]:
    """Return the least TTFT of any chunks, and the speed-ups that no chunks exceed.

    (√W + √((P - 1) c))² for a lone prompt and for all of them back to back. Linear layers are taken
    to be saturated here, which makes the limits a little better than the hardware's.
    """
    cost = costs.stage(stages).cost
    work = cost.work(0, PROMPT)

    def least(times: int) -> float:
        return (math.sqrt(times * work) + math.sqrt((stages - 1) * cost.c)) ** 2

    return (
        least(1),
        PROMPTS * PROMPT / least(PROMPTS) / one_stage,
        PROMPT / least(1) / one_stage,
    )


def one_stage_throughput(costs: ModelCosts, chunks: list[int]) -> float:
    """Return the best throughput of one stage among these fixed sizes, in tokens a second."""
    stage = costs.stage(1)

    def seconds(chunk: int) -> float:
        starts = range(0, PROMPT, chunk)
        return sum(stage.seconds([Chunk(s, min(chunk, PROMPT - s))]) for s in starts)

    return PROMPT / min(seconds(chunk) for chunk in chunks)


# --- tables --------------------------------------------------------------------------------------


def comparison_table(found: list[Compared]) -> str:
    """Return published and simulated side by side."""
    rows = [
        [
            f"PP{c.row.stages}",
            f"{c.row.chunk}{' dynamic' if c.row.dynamic else ''}",
            f"{c.row.prompt // 1024}K",
            f"{c.row.ttft:.1f}",
            f"{c.ttft:.1f}",
            f"{c.ttft_error:+.1%}{' (fitted)' if c.calibrated else ''}",
            "" if c.row.throughput is None else f"{c.row.throughput:.0f}",
            "" if c.throughput is None else f"{c.throughput:.0f}",
            "" if c.throughput_error is None else f"{c.throughput_error:+.1%}",
        ]
        for c in found
    ]
    head = ["layout", "chunk", "prompt", "TTFT s", "simulated", "error"]
    return table([*head, "tokens/s", "simulated", "error"], rows)


def error_line(found: list[Compared]) -> str:
    """Return how good the predictions are; fitted values are not among them."""
    ttft = [abs(c.ttft_error) for c in found if not c.calibrated]
    throughput = [abs(c.throughput_error) for c in found if c.throughput_error is not None]
    return (
        f"Predicted: {len(ttft)} TTFTs, mean error {statistics.mean(ttft):.1%}, largest "
        f"{max(ttft):.1%}; {len(throughput)} throughputs, none of them fitted, mean "
        f"{statistics.mean(throughput):.1%}, largest {max(throughput):.1%}."
    )


def reach_row(name: str, found: Reached) -> list[str]:
    """Return a line of the table of results."""
    return [
        name,
        f"{found.ttft:.2f}",
        f"{found.back_to_back:.2f}",
        f"{found.in_turn:.2f}",
        f"{found.bubble:.1%}",
        str(found.steps),
    ]


def results(
    published: Published, costs: ModelCosts, stages: int
) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the table of what each way reaches on a layout, and the same as numbers."""
    rows_there = [r for r in published.rows if r.stages == stages and r.prompt == PROMPT]
    most = max(row.chunk for row in rows_there)
    one_stage = one_stage_throughput(costs, [r.chunk for r in published.rows if r.stages == 1])
    found = {
        f"{'dynamic' if row.dynamic else 'fixed'} {row.chunk}": published_reach(
            published, costs, row, one_stage
        )
        for row in rows_there
    }
    found["Penstock"] = reach(costs, stages, most, one_stage)
    ttft, back_to_back, in_turn = limits(costs, stages, one_stage)
    lines = [reach_row(name, reached) for name, reached in found.items()]
    lines.append(["limit", f"{ttft:.2f}", f"{back_to_back:.2f}", f"{in_turn:.2f}", "", ""])
    head = ["way", "TTFT s", "speed-up, queue", "speed-up, in turn", "bubble", "steps"]
    numbers = {name: asdict(reached) for name, reached in found.items()}
    numbers["limit"] = {"ttft": ttft, "back_to_back": back_to_back, "in_turn": in_turn}
    return table(head, lines), numbers


def sensitivity(published: Published, costs: ModelCosts, stages: int) -> str:
    """Return what is left of it if every step cost more, or steps were noisy."""
    most = max(row.chunk for row in published.rows)
    lines: list[list[str]] = []
    for extra, noise in ((0.0, 0.0), (0.0, 0.05), (0.01, 0.0), (0.03, 0.0)):
        worse = replace(costs, handover=costs.handover + extra)
        one_stage = one_stage_throughput(worse, [most])
        ready = penstock_way(worse, stages, most, [PROMPT] * 2, in_turn=True, noise=noise).ready
        queue = penstock_way(worse, stages, most, [PROMPT] * PROMPTS, noise=noise)
        dynamic = published.row(stages, most, dynamic=True)
        theirs = published_way(published, worse, dynamic, [PROMPT])
        their_queue = published_way(published, worse, dynamic, [PROMPT] * PROMPTS)
        _, limit, _ = limits(worse, stages, one_stage)
        lines.append(
            [
                f"{worse.stage(stages).cost.c * 1e3:.1f} ms",
                f"{noise:.0%}",
                f"{ready[1] - ready[0]:.2f}",
                f"{theirs.makespan:.2f}" if not noise else "",
                f"{PROMPTS * PROMPT / queue.makespan / one_stage:.2f}",
                f"{PROMPTS * PROMPT / their_queue.makespan / one_stage:.2f}" if not noise else "",
                f"{limit:.2f}",
            ]
        )
    head = ["c a step", "noise", "TTFT s", "dynamic", "speed-up, queue", "dynamic", "limit"]
    return table(head, lines)


def long_prompts(published: Published, costs: ModelCosts) -> str:
    """Return the TTFTs of the longer prompts of the table."""
    lines: list[list[str]] = []
    for row in published.rows:
        if row.dynamic and row.prompt > PROMPT:
            theirs = published_way(published, costs, row, [row.prompt]).makespan
            ready = penstock_way(costs, row.stages, row.chunk, [row.prompt] * 2, in_turn=True).ready
            cost = costs.stage(row.stages).cost
            work, overhead = cost.work(0, row.prompt), (row.stages - 1) * cost.c
            limit = (math.sqrt(work) + math.sqrt(overhead)) ** 2
            lines.append(
                [
                    f"{row.prompt // 1024}K",
                    f"{row.ttft:.1f}",
                    f"{theirs:.1f}",
                    f"{ready[1] - ready[0]:.1f}",
                    f"{limit:.1f}",
                ]
            )
    return table(["prompt", "published s", "simulated", "Penstock", "limit"], lines)


def scale() -> str:
    """Return how long the simulator takes for the largest cases."""
    costs = calibrate(QWEN)
    cases = {
        "1M tokens on 64 stages": (64, [8 * PROMPT]),
        "1,000 prompts of 16K on 8 stages": (8, [16_384] * 1000),
        "1,000 prompts of 16K on 64 stages": (64, [16_384] * 1000),
    }
    lines: list[list[str]] = []
    for name, (stages, prompts) in cases.items():
        begun = time.process_time()
        run = penstock_way(costs, stages, 18_432, prompts, learn=True)
        lines.append([name, f"{run.steps}", f"{time.process_time() - begun:.1f} s"])
    return table(["case", "steps", "CPU time"], lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--scale", action="store_true", help="time the largest cases as well")
    arguments = parser.parse_args()
    written: dict[str, object] = {"kind": "simulated"}
    for published, layouts in ((QWEN, (4, 8)), (DEEPSEEK, (4,))):
        costs = calibrate(published)
        found = compare(published, costs)
        print(f"\n## {published.name}, {published.layout}\n\n{costs}\n")
        print(comparison_table(found), f"\n\n{error_line(found)}", sep="")
        layout_numbers: dict[str, object] = {}
        for stages in layouts:
            text, layout_numbers[f"PP{stages}"] = results(published, costs, stages)
            print(f"\n### PP{stages}, simulated\n\n{text}\n")
            print(sensitivity(published, costs, stages))
        if any(row.prompt > PROMPT for row in published.rows):
            print(f"\n### Longer prompts, simulated\n\n{long_prompts(published, costs)}")
        written[published.name] = {
            "costs": asdict(costs),
            "rows": [asdict(c) for c in found],
            "layouts": layout_numbers,
        }
    if arguments.scale:
        print(f"\n## The simulator itself\n\n{scale()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
