"""What the planning commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.scheduler.layer_split import half_costs, split_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.timeline import StepSpan, TraceNotes
    from penstock_runtime.simulator.capacity import Candidate, Targets
    from penstock_runtime.simulator.explain import Explanation, Question
    from penstock_runtime.simulator.workload import Arrival

_ROWS = 60
"""Steps that are printed; a longer plan is shown by its ends."""


def pretty(found: object) -> bytes:
    """Return JSON that a person can read too."""
    return (json.dumps(found, indent=2) + "\n").encode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal that is a Markdown table as well."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


# --- explain-chunks ------------------------------------------------------------------------------


def question_line(question: Question) -> str:
    """Return what was asked, for a title."""
    cached = f", {question.cached_tokens} cached" if question.cached_tokens else ""
    times = f", {question.prompts} times" if question.prompts > 1 else ""
    return f"{question.prompt_tokens} tokens{cached}{times} on {len(question.costs)} stages"


def explanation_text(question: Question, answer: Explanation) -> str:
    """Return the plan and its figures."""
    ratio = answer.makespan / answer.optimum
    lines = [
        f"{question_line(question)}, {question.chunks.mode} chunks. All times are simulated.",
        "",
        table(
            ["step", "tokens", "length", "predicted", "begins at 0", "ends at last"],
            _step_rows(answer),
        ),
        "",
        f"steps               {len(answer.steps)}; √((P-1) W / c) = {answer.best_count:.1f}",
        f"prompts ready       {_seconds(answer.makespan)}",
        f"Σt + (P-1) max t    {_seconds(answer.formula)}",
        (
            f"closed-form optimum {_seconds(answer.optimum)}, (√W + √((P-1) c))²; "
            f"this plan takes {ratio:.3f} of it"
        ),
        f"bubble              {answer.bubble:.1%} of the stages' time",
        (
            f"speed-up            {answer.speedup:.2f} over one worker with all layers "
            f"({answer.speedup / len(question.costs):.1%} of {len(question.costs)})"
        ),
    ]
    return "\n".join(lines)


def _step_rows(answer: Explanation) -> list[list[str]]:
    last = max(span.stage for span in answer.spans)
    ends = {span.step: span.end for span in answer.spans if span.stage == last}
    rows: list[list[str]] = []
    for number, (span, predicted) in enumerate(zip(answer.steps, answer.predicted, strict=True)):
        tokens = "  ".join(f"{c.key}: [{c.start}, {c.start + c.length})" for c in span.chunks)
        length = sum(chunk.length for chunk in span.chunks)
        rows.append(
            [
                str(number),
                tokens,
                str(length),
                _seconds(predicted),
                _seconds(span.begin),
                _seconds(ends[span.step]),
            ]
        )
    if len(rows) > _ROWS:
        left_out = [f"… {len(rows) - _ROWS} more", *[""] * 5]
        rows[_ROWS // 2 : -_ROWS // 2] = [left_out]
    return rows


def explanation_json(question: Question, answer: Explanation) -> dict[str, object]:
    """Return the plan and its figures, in seconds and tokens."""
    return {
        "kind": "simulated",
        "prompt_tokens": question.prompt_tokens,
        "cached_tokens": question.cached_tokens,
        "prompts": question.prompts,
        "stages": len(question.costs),
        "steps": [
            {"chunks": [chunk._asdict() for chunk in span.chunks], "predicted_seconds": predicted}
            for span, predicted in zip(answer.steps, answer.predicted, strict=True)
        ],
        "ready_seconds": answer.ready,
        "makespan_seconds": answer.makespan,
        "formula_seconds": answer.formula,
        "optimum_seconds": answer.optimum,
        "bubble": answer.bubble,
        "speedup": answer.speedup,
    }


def layer_advice(question: Question, counts: Sequence[float], attention_share: float) -> str:
    """Return how to divide the layers by what the stages cost.

    Args:
        question: the prompt, and what stages with these layers cost.
        counts: layers of each stage now.
        attention_share: as for `half_costs`.

    Raises:
        ValueError: if the counts are not those of so many stages.
    """
    probe = [Chunk(question.prompt_tokens // 2, question.chunks.max_tokens)]
    linear = [Cost(0.0, 0.0, cost.b, 0.0).step(probe) for cost in question.costs]
    attention = [Cost(0.0, cost.gamma, 0.0, cost.a).step(probe) for cost in question.costs]
    costs = half_costs(counts, linear, attention, attention_share)
    found = [last - first for first, last in split_layers(costs, len(counts))]
    listed = ", ".join(f"{count:g}" for count in found)
    return (
        f"\nlayers              {_counts(found)} of {sum(counts):g} would be even by what the "
        f"stages cost; now they are {_counts(counts)}\n"
        f"{'':20}in the manifest: prefill.layersPerStage: [{listed}]"
    )


def _counts(counts: Sequence[float]) -> str:
    return "/".join(f"{count:g}" for count in counts)


# --- plan-capacity -------------------------------------------------------------------------------


def capacity_text(
    arrivals: Sequence[Arrival], candidates: Sequence[Candidate], targets: Targets
) -> str:
    """Return all that was tried, and the answer."""
    span = max(arrivals[-1].time, 1e-9)
    tokens = sum(arrival.input_tokens for arrival in arrivals)
    percent = f"p{targets.percent:g}"
    best = candidates[-1]
    lines = [
        (
            f"{len(arrivals)} requests in {span:.1f} s: {len(arrivals) / span:.3g} requests/s, "
            f"{tokens / span:.4g} prompt tokens/s. All figures are simulated."
        ),
        "",
        table(
            [
                "groups",
                "decode",
                "TTFT p50",
                f"TTFT {percent}",
                "ITL p50",
                f"ITL {percent}",
                "prefill busy",
                "decode busy",
                "cached",
                "",
            ],
            [_candidate_row(candidate) for candidate in candidates],
        ),
        "",
        (
            f"{best.groups} prefill groups and {best.workers} decode workers keep "
            f"{targets.percent:g} % of TTFTs within {targets.ttft:g} s and of gaps within "
            f"{targets.itl:g} s."
        ),
    ]
    return "\n".join(lines)


def _candidate_row(candidate: Candidate) -> list[str]:
    decoded = candidate.workers > 0
    return [
        str(candidate.groups),
        str(candidate.workers) if decoded else "any",
        _seconds(candidate.ttft_p50),
        _seconds(candidate.ttft),
        _seconds(candidate.itl_p50) if decoded else "",
        _seconds(candidate.itl) if decoded else "",
        f"{candidate.prefill_utilisation:.0%}",
        f"{candidate.decode_utilisation:.0%}" if decoded else "",
        f"{candidate.cached_share:.0%}",
        "meets" if candidate.meets else "",
    ]


# --- timeline ------------------------------------------------------------------------------------


def timeline_text(spans: Sequence[StepSpan], notes: TraceNotes) -> str:
    """Return what each stage did, and how far the clocks can be trusted."""
    rows: list[list[str]] = []
    for stage in sorted({span.stage for span in spans}):
        own = [span for span in spans if span.stage == stage]
        busy = sum(span.end - span.begin for span in own)
        wait = sum(span.wait for span in own)
        tokens = sum(chunk.length for span in own for chunk in span.chunks)
        share = wait / (busy + wait) if busy + wait else 0.0
        rows.append(
            [str(stage), str(len(own)), str(tokens), _seconds(busy), _seconds(wait), f"{share:.1%}"]
        )
    head = ["stage", "steps", "tokens", "computed", "waited", "bubble"]
    return (
        f"{table(head, rows)}\n\nEach stage's clock was read to {notes.clock_error_us:.0f} µs. The "
        f"hosts' clocks differ by {notes.clock_skew_us:.0f} µs or more, as hand-overs show."
    )


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
