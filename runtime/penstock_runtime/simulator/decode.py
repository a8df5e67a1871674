"""Decode workers, by a model of their steps.

A step of B requests whose sequences have K tokens in all takes

    step + request B + token K   seconds:

reading the weights, what each row of the batch adds, and reading the KV. A worker runs step after
step; requests whose KV has come in join at the next step's begin, in order, while the batch and the
KV memory have room for the whole sequence. The first step of a request gives its first token.

Left out: preemption (a sequence is admitted with the room that its whole answer will need, which
is known here) and prefill on the decode worker.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeModel:
    """One decode worker."""

    step: float
    """Seconds a step whatever is in it."""
    request: float = 0.0
    """Seconds a request in the batch."""
    token: float = 0.0
    """Seconds a token of KV that the batch reads."""
    max_batch: int = 64
    kv_tokens: int = 10**9
    """That its memory holds."""

    def __post_init__(self) -> None:
        times = (self.step, self.request, self.token)
        if min(times) < 0 or not 0 < sum(times) < math.inf:
            raise ValueError(f"steps take time: {self}")
        if min(self.max_batch, self.kv_tokens) < 1:
            raise ValueError(f"a decode worker holds at least one request: {self}")

    def seconds(self, batch: int, tokens: int) -> float:
        """Return the time of one step."""
        return self.step + self.request * batch + self.token * tokens


class Sequence(NamedTuple):
    """A request whose KV is with a decode worker at `ready`."""

    ready: float
    number: int
    input_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """KV that it will need at its end."""
        return self.input_tokens + self.output_tokens


class TokenGaps:
    """Times between two tokens of one request, counted by their length."""

    def __init__(self) -> None:
        self._count: dict[float, int] = {}

    def add(self, seconds: float, times: int) -> None:
        """The gap occurred so many times."""
        if times:
            # A microsecond is finer than any target, and keeps the table small.
            rounded = round(seconds, 6)
            self._count[rounded] = self._count.get(rounded, 0) + times

    def merge(self, other: TokenGaps) -> None:
        """Add those of another worker."""
        for seconds, times in other._count.items():
            self._count[seconds] = self._count.get(seconds, 0) + times

    def percentile(self, percent: float) -> float:
        """Return the least gap that `percent` of all do not exceed; 0 if there is none."""
        wanted = math.ceil(percent / 100 * sum(self._count.values()))
        for seconds in sorted(self._count):
            wanted -= self._count[seconds]
            if wanted <= 0:
                return seconds
        return 0.0


class DecodeWorker:
    """One worker, told of its requests in the order of their time.

    Each call of `add` first runs the steps that begin before that time.
    """

    def __init__(self, model: DecodeModel) -> None:
        self._model = model
        self._waiting: deque[Sequence] = deque()
        self._ends: list[tuple[int, int, int]] = []
        """(number of the step that is its last, request, its tokens in the end)."""
        self._step = 0
        self._begin = 0.0
        """Of the next step."""
        self._tokens = 0
        """Of KV that the next step reads."""
        self._reserved = 0
        self.load = 0
        """Tokens of all that is here, as they will be in the end."""
        self.gaps = TokenGaps()
        self.first_tokens: dict[int, float] = {}
        """Request → seconds."""
        self.busy_seconds = 0.0
        self.end = 0.0

    def add(self, sequence: Sequence) -> None:
        """A request's KV comes in. Raises ValueError if it can never be held."""
        if sequence.tokens > self._model.kv_tokens:
            raise ValueError(
                f"a sequence of {sequence.tokens} tokens does not fit into a decode worker's "
                f"{self._model.kv_tokens}"
            )
        self.advance(sequence.ready)
        self._waiting.append(sequence)
        self.load += sequence.tokens

    def advance(self, time: float = math.inf) -> None:
        """Run all steps that begin before `time`."""
        while self._ends or self._waiting:
            if not self._ends:
                self._begin = max(self._begin, self._waiting[0].ready)
            if self._begin >= time:
                return
            self._run()

    def _run(self) -> None:
        going_on = len(self._ends)
        joined = self._join()
        batch = going_on + len(joined)
        seconds = self._model.seconds(batch, self._tokens)
        self.end = self._begin + seconds
        self.busy_seconds += seconds
        self.gaps.add(seconds, going_on)
        for number in joined:
            self.first_tokens[number] = self.end
        self._tokens += batch
        while self._ends and self._ends[0][0] == self._step:
            _, _, tokens = heapq.heappop(self._ends)
            self._tokens -= tokens
            self._reserved -= tokens
            self.load -= tokens
        self._step += 1
        self._begin = self.end

    def _join(self) -> list[int]:
        joined: list[int] = []
        while self._waiting and len(self._ends) < self._model.max_batch:
            new = self._waiting[0]
            if new.ready > self._begin or self._reserved + new.tokens > self._model.kv_tokens:
                break
            self._waiting.popleft()
            heapq.heappush(self._ends, (self._step + new.output_tokens - 1, new.number, new.tokens))
            self._reserved += new.tokens
            self._tokens += new.input_tokens
            joined.append(new.number)
        return joined
