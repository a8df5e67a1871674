"""Explaining a plan: the optimum, cached prefixes, pictures and traces."""

from __future__ import annotations

import json
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from penstock_runtime.engine.timeline import decode_trace, encode_trace, spans_of, trace_of
from penstock_runtime.scheduler.chunk_planner import ChunkSettings
from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.simulator.explain import Explanation, Question, explain
from penstock_runtime.simulator.hardware import Hardware, StageModel
from penstock_runtime.simulator.report import explanation_json, explanation_text, layer_advice
from penstock_runtime.simulator.svg import timeline_svg

N = 131072
DESIGN = Cost(c=0.01, gamma=0.0, b=3.5 / N, a=3.5 / N / N)


def question(stages: int = 8, **options: object) -> Question:
    costs = options.pop("costs", (DESIGN,) * stages)
    chosen: dict[str, object] = {
        "prompt_tokens": N,
        "page_size": 64,
        "costs": costs,
        "chunks": ChunkSettings(max_tokens=18432),
        "hardware": Hardware(stages=tuple(StageModel(c) for c in costs)),  # type: ignore[attr-defined]
    }
    return Question(**(chosen | options))  # type: ignore[arg-type]


def test_the_worked_example_comes_within_a_percent_of_the_optimum() -> None:
    answer = explain(question())
    assert answer.optimum == pytest.approx(8.47)
    assert answer.best_count == pytest.approx(70)
    assert len(answer.steps) == 70
    assert answer.optimum <= answer.makespan <= 1.01 * answer.optimum
    assert answer.makespan == pytest.approx(answer.formula)
    assert answer.bubble == pytest.approx(1 - sum(answer.predicted) / answer.makespan)
    # One worker: 8 times the work of a stage, and a single step.
    assert answer.speedup == pytest.approx((8 * 7.0 + 0.01) / answer.makespan)


@pytest.mark.parametrize("gamma", [1e-8, 1e-7, 7e-7])
def test_reading_the_prefix_leaves_the_steps_equal(gamma: float) -> None:
    cost = Cost(c=0.01, gamma=gamma, b=DESIGN.b, a=DESIGN.a)
    answer = explain(question(4, costs=(cost,) * 4))
    # The largest step that memory allows comes first, and the last takes what is left.
    equal = [t for s, t in zip(answer.steps, answer.predicted, strict=True) if s.step > 2][:-1]
    assert max(equal) < 1.05 * min(equal)
    assert answer.makespan <= 1.04 * answer.optimum


def test_a_cached_prefix_is_not_computed_and_its_chunks_are_equal() -> None:
    answer = explain(question(4, cached_tokens=65_600))
    assert answer.steps[0].chunks[0].start == 65_600
    times = answer.predicted
    assert max(times) < 1.1 * sum(times) / len(times)
    assert answer.optimum <= answer.makespan <= 1.02 * answer.optimum


def test_more_prompts_make_fewer_and_larger_steps() -> None:
    one, several = explain(question()), explain(question(prompts=4))
    assert len(several.ready) == 4
    assert len(several.steps) < 4 * len(one.steps)
    assert several.bubble < one.bubble
    assert several.speedup > one.speedup


def test_fixed_chunks_are_explained_too() -> None:
    fixed = ChunkSettings(mode="fixed", fixed_tokens=6144, max_tokens=6144)
    answer = explain(question(chunks=fixed))
    assert {s.chunks[0].length for s in answer.steps} == {6144, N % 6144}
    assert answer.makespan > 1.15 * answer.optimum


def test_text_and_json_say_that_it_is_simulated() -> None:
    asked = question(4, prompt_tokens=10_000, cached_tokens=1000)
    answer = explain(asked)
    text = explanation_text(asked, answer)
    assert "simulated" in text
    assert "10000 tokens, 1000 cached on 4 stages" in text
    found = json.loads(json.dumps(explanation_json(asked, answer)))
    assert found["kind"] == "simulated"
    lengths = [step["chunks"][0]["length"] for step in found["steps"]]
    assert sum(lengths) == 10_000 - 960


def test_long_plans_are_shown_by_their_ends() -> None:
    answer = explain(question())
    text = explanation_text(question(), answer)
    assert "… 10 more" in text
    assert len(text.splitlines()) < 80


def test_layers_are_divided_by_what_stages_cost() -> None:
    twice = Cost(c=0.01, gamma=0.0, b=2 * DESIGN.b, a=2 * DESIGN.a)
    # Stage 1 takes twice as long for its layers, so it is to have fewer. Of the model's last layer
    # nothing is counted: the 12 of stage 0 take what 5.5 of the other 11 do.
    advice = layer_advice(question(costs=(DESIGN, twice)), [12, 12], 0.25)
    assert "layers              14.5/9.5 of 24 would be even" in advice
    assert "now they are 12/12" in advice
    assert "prefill.layersPerStage: [14.5, 9.5]" in advice


def test_layers_of_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="2 times do not describe stages of"):
        layer_advice(question(costs=(DESIGN, DESIGN)), [8, 8, 8], 0.25)


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compute"):
        question(cached_tokens=N)


# --- pictures and traces -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer() -> Explanation:
    return explain(question(3, prompt_tokens=9000, prompts=2))


def test_the_picture_has_a_bar_for_every_chunk_in_its_place(answer: Explanation) -> None:
    root = ET.fromstring(timeline_svg(answer.spans, "a < b & c"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in root.iter(f"{space}rect") if r.get("fill", "").startswith("hsl")]
    assert len(bars) == sum(len(span.chunks) for span in answer.spans)
    assert "a < b & c" in [text.text for text in root.iter(f"{space}text")]
    right = max(float(bar.get("x", "0")) + float(bar.get("width", "0")) for bar in bars)
    assert right == pytest.approx(1180, abs=0.5)
    idle = [r for r in root.iter(f"{space}rect") if r.get("fill") == "url(#idle)"]
    assert len(idle) == 3


def test_no_picture_of_nothing() -> None:
    with pytest.raises(ValueError, match="no step"):
        timeline_svg([], "")


def test_the_trace_can_be_read_back(answer: Explanation) -> None:
    trace = decode_trace(encode_trace(trace_of(answer.spans, kind="simulated")))
    assert trace.otherData.kind == "simulated"
    again = spans_of(trace)
    assert [s.chunks for s in again] == [s.chunks for s in answer.spans]
    for before, after in zip(answer.spans, again, strict=True):
        assert after.begin == pytest.approx(before.begin)
        assert after.end == pytest.approx(before.end)
        assert after.wait == pytest.approx(before.wait)
    raw = json.loads(encode_trace(trace))
    assert {event["ph"] for event in raw["traceEvents"]} == {"X", "M"}
    # Bars of one track never overlap, the waits included: viewers nest those that do.
    for stage in range(3):
        events = [e for e in raw["traceEvents"] if e["ph"] == "X" and e["pid"] == stage]
        events.sort(key=lambda e: e["ts"])
        for first, second in pairwise(events):
            assert first["ts"] + first["dur"] <= second["ts"] + 1e-3
