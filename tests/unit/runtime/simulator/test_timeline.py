"""The record of real steps: bounded, on the wall clock, joined over stages, served by HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry

from penstock_runtime.engine.compute import Compute
from penstock_runtime.engine.stage import PrefillStage
from penstock_runtime.engine.timeline import (
    MAX_TRACE_BYTES,
    ClockAnchor,
    SpanChunk,
    StepRecorder,
    StepSpan,
    TraceError,
    decode_trace,
    encode_trace,
    merge,
    spans_of,
    trace_of,
)
from penstock_runtime.worker.http import Health, create_app
from penstock_wire.messages import Admit, ChunkItem, Message, Released, StepDone, StepPlan

if TYPE_CHECKING:
    from penstock_runtime.attention.base import Segment

CHUNK = SpanChunk(7, 0, 64, "decode-0/boot#3")


def record(recorder: StepRecorder, step: int, begin: float) -> None:
    recorder.add(1, step, (CHUNK,), planned=begin - 0.25, begin=begin, end=begin + 0.5)


def test_the_oldest_steps_are_forgotten() -> None:
    recorder = StepRecorder(2, limit=3)
    for step in range(5):
        record(recorder, step, float(step))
    spans = spans_of(recorder.trace())
    assert [span.step for span in spans] == [2, 3, 4]
    assert spans[0].stage == 2
    assert spans[0].chunks == (CHUNK,)
    assert spans[0].wait == pytest.approx(0.25, abs=1e-5)


def test_times_are_those_of_the_wall_clock() -> None:
    recorder = StepRecorder(0)
    record(recorder, 0, time.perf_counter())
    wall = time.time()
    trace = recorder.trace()
    assert trace.otherData.kind == "measured"
    assert spans_of(trace)[0].begin == pytest.approx(wall, abs=1.0)
    assert 0 <= trace.otherData.clock_error_us < 1e6


def test_the_error_contains_how_far_the_wall_clock_was_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = StepRecorder(0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2.0)
    assert recorder.trace().otherData.clock_error_us == pytest.approx(2e6, rel=0.05)


def test_an_anchor_is_the_middle_of_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 11.0, 20.0, 20.5, 30.0, 34.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    monkeypatch.setattr(time, "time", lambda: 100.0)
    # The second of three attempts was the quickest.
    assert ClockAnchor.take(3) == (20.25, 100.0, 0.25)


def span(stage: int, step: int, begin: float, end: float) -> StepSpan:
    return StepSpan(stage, step, begin, end, 0.0, (CHUNK,), 1)


def test_stages_are_joined_and_their_skew_is_seen() -> None:
    first = trace_of([span(0, 0, 1000.0, 1001.0)], kind="measured", clock_error=1e-5)
    # Stage 1 got it a moment later, but its clock is 5 ms behind.
    second = trace_of([span(1, 0, 1000.995, 1002.0)], kind="measured", clock_error=3e-5)
    joined = merge([first, second])
    assert joined.otherData.clock_error_us == pytest.approx(30)
    assert joined.otherData.clock_skew_us == pytest.approx(5000, rel=1e-3)
    assert joined.otherData.zero_us == pytest.approx(1000e6)
    spans = spans_of(joined)
    assert [(s.stage, round(s.begin, 6)) for s in spans] == [(0, 0.0), (1, 0.995)]
    names = {e.args["name"] for e in joined.traceEvents if e.name == "process_name"}
    assert names == {"stage 0 (measured)", "stage 1 (measured)"}


def test_steps_of_different_epochs_say_nothing_about_skew() -> None:
    old = trace_of([span(0, 0, 5.0, 6.0)], kind="measured")
    new = trace_of([span(1, 0, 1.0, 2.0)._replace(epoch=2)], kind="measured")
    assert merge([old, new]).otherData.clock_skew_us == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"traceEvents": [{"name": "x", "ph": "Q", "pid": 0}], "otherData": {"kind": "measured"}}',
        b'{"traceEvents": [{"name": "", "ph": "X", "pid": -1}], "otherData": {"kind": "measured"}}',
    ],
)
def test_what_is_no_trace_is_refused(data: bytes) -> None:
    with pytest.raises(TraceError, match="no timeline"):
        decode_trace(data)


def test_events_without_chunks_and_endless_answers_are_refused() -> None:
    bare = (
        b'{"traceEvents": [{"name": "x", "ph": "X", "pid": 0}], "otherData": {"kind": "measured"}}'
    )
    with pytest.raises(TraceError, match="not one of ours"):
        spans_of(decode_trace(bare))
    with pytest.raises(TraceError, match="larger"):
        decode_trace(bytes(MAX_TRACE_BYTES + 1))


async def _get(recorder: StepRecorder | None) -> httpx.Response:
    app = create_app(
        Health(),
        CollectorRegistry(),
        dict,
        (lambda: None) if recorder is None else recorder.trace,
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        return await client.get("/timeline")


async def test_a_stage_serves_its_steps() -> None:
    recorder = StepRecorder(1)
    record(recorder, 4, 10.0)
    answer = await _get(recorder)
    assert answer.headers["content-type"] == "application/json"
    assert spans_of(decode_trace(answer.content))[0].step == 4


async def test_a_worker_without_a_pipeline_says_so() -> None:
    answer = await _get(None)
    assert answer.status_code == 404
    assert "no stage" in answer.json()["error"]


def test_a_full_record_is_within_the_limit() -> None:
    recorder = StepRecorder(0)
    for step in range(5000):
        record(recorder, step, float(step))
    assert len(encode_trace(recorder.trace())) < MAX_TRACE_BYTES / 16


# --- a real stage --------------------------------------------------------------------------------


class _Runner:
    page_size = 16

    def run(self, hidden_or_tokens: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        return torch.zeros(len(hidden_or_tokens), 1)


class _Kv:
    async def push(self, admit: Admit, first: int, last: int, start: int, end: int) -> None:
        """Nothing is sent."""

    async def load(self, admit: Admit, first: int, last: int) -> None:
        """Nothing is loaded."""

    def finish(self, admit: Admit) -> None:
        """Nothing is left."""


class _Ring:
    async def close(self) -> None:
        """The only stage has no neighbours."""


async def test_a_stage_records_what_it_computed() -> None:
    said: list[Message] = []
    released = asyncio.Event()

    def to_leader(message: Message) -> None:
        said.append(message)
        if isinstance(message, Released):
            released.set()

    compute = Compute(1)
    stage = PrefillStage(
        0,
        1,
        runner=_Runner(),
        compute=compute,
        ring=_Ring(),  # type: ignore[arg-type]
        kv=_Kv(),
        to_leader=to_leader,
        prompt_tokens=lambda _key, _start, length: torch.zeros(length, dtype=torch.int64),
    )
    stage.begin(3)
    admit = Admit(
        key=5,
        grant=9,
        receiver="decode-0/boot",
        incarnation=1,
        pages=(0, 1),
        target_pages=(0, 1),
        length=32,
    )
    for step, start in enumerate((0, 16)):
        stage.submit(
            StepPlan(
                step=step,
                epoch=3,
                items=(ChunkItem(5, start, 16, start == 16),),
                admit=(admit,) if step == 0 else (),
                release=(5,) if step else (),
            )
        )
    async with asyncio.timeout(10):
        await released.wait()
    await stage.end()
    compute.close()
    spans = spans_of(stage.timeline.trace())
    assert [(s.stage, s.epoch, s.step) for s in spans] == [(0, 3, 0), (0, 3, 1)]
    assert [s.chunks for s in spans] == [
        (SpanChunk(5, 0, 16, "decode-0/boot#9"),),
        (SpanChunk(5, 16, 16, "decode-0/boot#9"),),
    ]
    done = [message for message in said if isinstance(message, StepDone)]
    for span, told in zip(spans, done, strict=True):
        assert span.end - span.begin == pytest.approx(told.compute_seconds, abs=1e-5)
        assert span.wait == pytest.approx(told.wait_seconds, abs=1e-5)
