"""What the steps of a pipeline did, and when: a bounded record, and Chrome's trace format.

The JSON is what chrome://tracing and https://ui.perfetto.dev open (Trace Event Format, complete and
metadata events): one process a stage, one bar a step, and the wait before it. The simulator writes
the same, so a prediction and what really happened can be laid over each other. Pure: no torch.

Clocks. A stage measures with its monotonic clock and tells times by the wall clock. How well the
two were read together, and how far the wall clock was corrected meanwhile, is `clock_error_us`.
What it does not contain is how far the clocks of two hosts differ. `merge` bounds that from below:
a stage cannot have begun a step before the stage in front of it ended the same step, so what it
seems to be too early is skew.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_TRACE_BYTES = 64 * 1024 * 1024
"""Largest trace that is read from a worker: a full record is about 2 MiB."""


class SpanChunk(NamedTuple):
    """Tokens [start, start + length) of a request in a step."""

    key: int
    """Of the request in its epoch."""
    start: int
    length: int
    request: str = ""
    """Receiver and grant: what the decode worker calls it."""


class StepSpan(NamedTuple):
    """One step on one stage. Seconds on one clock."""

    stage: int
    step: int
    begin: float
    end: float
    wait: float
    """Before `begin`, with a plan to carry out: for activations, or for pages."""
    chunks: tuple[SpanChunk, ...]
    epoch: int = 0


class ClockAnchor(NamedTuple):
    """One instant on both clocks, in seconds. `error`: half of what reading them took."""

    monotonic: float
    wall: float
    error: float

    @property
    def offset(self) -> float:
        """Wall minus monotonic."""
        return self.wall - self.monotonic

    @classmethod
    def take(cls, attempts: int = 3) -> ClockAnchor:
        """Read both clocks. Of several attempts the quickest: the others were interrupted."""
        return min((cls._read() for _ in range(attempts)), key=lambda anchor: anchor.error)

    @classmethod
    def _read(cls) -> ClockAnchor:
        before = time.perf_counter()
        wall = time.time()
        after = time.perf_counter()
        return cls((before + after) / 2, wall, (after - before) / 2)


class StepRecorder:
    """The last `limit` steps of one stage. Times are those of `time.perf_counter`."""

    def __init__(self, stage: int, limit: int = 4096) -> None:
        self._stage = stage
        self._spans: deque[StepSpan] = deque(maxlen=limit)
        self._anchor = ClockAnchor.take()

    def add(
        self,
        epoch: int,
        step: int,
        chunks: tuple[SpanChunk, ...],
        *,
        planned: float,
        begin: float,
        end: float,
    ) -> None:
        """Record a step: `planned` is when the stage turned to it, `begin` when it computed."""
        self._spans.append(StepSpan(self._stage, step, begin, end, begin - planned, chunks, epoch))

    def trace(self) -> Trace:
        """Return the record by the wall clock, in microseconds since 1970."""
        now = ClockAnchor.take()
        moved = abs(now.offset - self._anchor.offset)
        spans = [
            s._replace(begin=s.begin + now.offset, end=s.end + now.offset) for s in self._spans
        ]
        return trace_of(spans, kind="measured", clock_error=now.error + moved)


# --- the trace -----------------------------------------------------------------------------------


class TraceEvent(Struct, kw_only=True, frozen=True):
    """One event. X: complete, `ts` and `dur` in microseconds. M: names a process or a track."""

    name: str
    ph: Literal["X", "M"]
    pid: Annotated[int, Meta(ge=0, le=4096)]
    """The stage."""
    tid: int = 0
    ts: float = 0.0
    dur: float = 0.0
    cat: str = ""
    args: dict[str, Any] = {}


class TraceNotes(Struct, kw_only=True, frozen=True):
    """What there is to know about a trace's times."""

    kind: Literal["simulated", "measured"]
    clock_error_us: float = 0.0
    clock_skew_us: float = 0.0
    """Least difference between the clocks of the stages' hosts; 0 before `merge`."""
    zero_us: float = 0.0
    """What was subtracted from the wall clock."""


class Trace(Struct, kw_only=True, frozen=True):
    """A whole trace file."""

    traceEvents: list[TraceEvent]  # noqa: N815 - the format's name
    otherData: TraceNotes  # noqa: N815
    displayTimeUnit: Literal["ms", "ns"] = "ms"  # noqa: N815


class TraceError(Exception):
    """Bytes that are not a trace of ours, or too many."""


def trace_of(
    spans: Iterable[StepSpan], *, kind: Literal["simulated", "measured"], clock_error: float = 0.0
) -> Trace:
    """Return the trace of steps on any number of stages; `clock_error` in seconds."""
    events: list[TraceEvent] = []
    stages: set[int] = set()
    for span in spans:
        stages.add(span.stage)
        if span.wait > 0:
            events.append(_event(span, "wait", span.begin - span.wait, span.wait))
        events.append(_event(span, _label(span), span.begin, span.end - span.begin))
    events[:0] = chain.from_iterable(_names(stage, kind) for stage in sorted(stages))
    notes = TraceNotes(kind=kind, clock_error_us=clock_error * 1e6)
    return Trace(traceEvents=events, otherData=notes)


def _event(span: StepSpan, name: str, begin: float, seconds: float) -> TraceEvent:
    args = {
        "epoch": span.epoch,
        "step": span.step,
        "chunks": [chunk._asdict() for chunk in span.chunks],
    }
    return TraceEvent(
        name=name,
        ph="X",
        cat="wait" if name == "wait" else "compute",
        pid=span.stage,
        ts=begin * 1e6,
        dur=max(0.0, seconds) * 1e6,
        args=args,
    )


def _label(span: StepSpan) -> str:
    if len(span.chunks) == 1:
        chunk = span.chunks[0]
        return f"{chunk.key}: [{chunk.start}, {chunk.start + chunk.length})"
    return f"{len(span.chunks)} requests"


def _names(stage: int, kind: str) -> list[TraceEvent]:
    return [
        TraceEvent(
            name="process_name", ph="M", pid=stage, args={"name": f"stage {stage} ({kind})"}
        ),
        TraceEvent(name="process_sort_index", ph="M", pid=stage, args={"sort_index": stage}),
        TraceEvent(name="thread_name", ph="M", pid=stage, args={"name": "compute"}),
    ]


def encode_trace(trace: Trace) -> bytes:
    """Return the JSON."""
    return msgspec.json.encode(trace)


def decode_trace(data: bytes) -> Trace:
    """Read a trace of ours. Raises TraceError."""
    if len(data) > MAX_TRACE_BYTES:
        raise TraceError(f"a trace of {len(data)} bytes is larger than {MAX_TRACE_BYTES}")
    try:
        return msgspec.json.decode(data, type=Trace)
    except msgspec.DecodeError as error:
        raise TraceError(f"this is no timeline of a stage: {error}") from error


def merge(traces: Sequence[Trace]) -> Trace:
    """Join the traces of several stages; times begin at 0, the first event's.

    The error is the largest of all, see the head of this file for the skew.
    """
    events = [event for trace in traces for event in trace.traceEvents]
    timed = [event for event in events if event.ph == "X"]
    zero = min((event.ts for event in timed), default=0.0)
    joined = [
        msgspec.structs.replace(event, ts=event.ts - zero) if event.ph == "X" else event
        for event in events
    ]
    kinds = {trace.otherData.kind for trace in traces}
    notes = TraceNotes(
        kind="simulated" if kinds == {"simulated"} else "measured",
        clock_error_us=max((t.otherData.clock_error_us for t in traces), default=0.0),
        clock_skew_us=_skew(timed),
        zero_us=zero,
    )
    return Trace(traceEvents=joined, otherData=notes)


def _skew(events: Iterable[TraceEvent]) -> float:
    """Return by how much a stage seems at most to begin a step before it was handed over."""
    computed = {
        (event.args.get("epoch"), event.args.get("step"), event.pid): event
        for event in events
        if event.cat == "compute"
    }
    skew = 0.0
    for (epoch, step, stage), event in computed.items():
        before = computed.get((epoch, step, stage - 1))
        if before is not None:
            skew = max(skew, before.ts + before.dur - event.ts)
    return skew


def spans_of(trace: Trace) -> list[StepSpan]:
    """Return a trace's steps, for a picture. Raises TraceError if an event lacks its chunks."""
    waits: dict[tuple[object, object, int], float] = {}
    spans: list[StepSpan] = []
    for event in trace.traceEvents:
        if event.ph != "X":
            continue
        identity = (event.args.get("epoch"), event.args.get("step"), event.pid)
        if event.cat == "wait":
            waits[identity] = event.dur / 1e6
            continue
        try:
            step = msgspec.convert(event.args, _StepArgs)
        except msgspec.ValidationError as error:
            raise TraceError(f"the step {event.name!r} is not one of ours: {error}") from error
        begin = event.ts / 1e6
        spans.append(
            StepSpan(
                event.pid,
                step.step,
                begin,
                begin + event.dur / 1e6,
                waits.get(identity, 0.0),
                tuple(SpanChunk(c.key, c.start, c.length, c.request) for c in step.chunks),
                step.epoch,
            )
        )
    return spans


class _ChunkArgs(Struct):
    key: int
    start: int
    length: int
    request: str = ""


class _StepArgs(Struct):
    epoch: int
    step: int
    chunks: list[_ChunkArgs]
