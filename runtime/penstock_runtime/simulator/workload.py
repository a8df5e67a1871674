"""Prompts over time: drawn at random, or read from a trace file.

Trace files are JSON lines as the Mooncake project publishes them: `timestamp` in milliseconds,
`input_length` and `output_length` in tokens, and `hash_ids`, one for each block of 512 tokens of
the input. Two requests whose hash_ids begin alike have that part of their prompts in common.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE_BLOCK = 512
"""Tokens that one of a trace's hash_ids stands for."""
MAX_TOKENS = 16 * 1024 * 1024
MAX_REQUESTS = 10_000_000

_Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class TraceInvalid(Exception):  # noqa: N818 - it names the event
    """A line of a trace file is not a request. The message names the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    time: float
    """Seconds since the first."""
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the input's blocks of TRACE_BLOCK tokens; empty: it has nothing in common."""

    def tokens(self, number: int) -> array[int]:
        """Return token ids that have in common with other requests what the blocks say.

        number: of this request, for what has no block.
        """
        made = array("i")
        for block in self.blocks:
            # Ids of blocks are even, of requests odd: they never meet.
            made.extend(array("i", [2 * (block % 2**30)]) * TRACE_BLOCK)
        del made[self.input_tokens :]
        rest = self.input_tokens - len(made)
        made.extend(array("i", [2 * number + 1]) * rest)
        return made


class _Line(Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    output_length: _Tokens
    hash_ids: list[Annotated[int, Meta(ge=0)]] = []


def read_trace(path: Path, *, limit: int = MAX_REQUESTS) -> list[Arrival]:
    """Return the first `limit` requests of a trace file, by time. Raises TraceInvalid, OSError."""
    decoder = msgspec.json.Decoder(_Line)
    arrivals: list[Arrival] = []
    with path.open("rb") as lines:
        for number, text in enumerate(lines, start=1):
            if len(arrivals) >= limit:
                break
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise TraceInvalid(f"{path}, line {number}: {error}") from error
            arrivals.append(_arrival(line))
    if not arrivals:
        raise TraceInvalid(f"{path} has no request")
    arrivals.sort(key=lambda arrival: arrival.time)
    return _from_zero(arrivals)


def _arrival(line: _Line) -> Arrival:
    # An answer has at least a token: the one that ends it.
    output = max(1, line.output_length)
    return Arrival(line.timestamp / 1e3, line.input_length, output, tuple(line.hash_ids))


def _from_zero(arrivals: list[Arrival]) -> list[Arrival]:
    first = arrivals[0].time
    return [Arrival(a.time - first, a.input_tokens, a.output_tokens, a.blocks) for a in arrivals]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonLoad:
    """Requests that come independently of each other."""

    rate: float
    """Requests a second."""
    requests: int
    input_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""
    spread: float = 0.0
    """Standard deviation of the logarithm of both lengths (log-normal); 0: all alike."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rate, self.input_tokens, self.output_tokens) <= 0 or self.requests < 1:
            raise ValueError(f"rates, lengths and numbers of requests are above zero: {self}")
        if not 0 <= self.spread < 4:
            raise ValueError(f"a spread lies in [0, 4), not at {self.spread}")

    def arrivals(self) -> list[Arrival]:
        """Draw them."""
        return _from_zero(list(self._draw()))

    def _draw(self) -> Iterator[Arrival]:
        dice = random.Random(self.seed)  # noqa: S311 - a simulation
        time = 0.0
        for _ in range(self.requests):
            time += dice.expovariate(self.rate)
            yield Arrival(
                time, self._length(dice, self.input_tokens), self._length(dice, self.output_tokens)
            )

    def _length(self, dice: random.Random, mean: float) -> int:
        # The mean of a log-normal is exp(mu + sigma²/2).
        factor = math.exp(dice.gauss(-(self.spread**2) / 2, self.spread)) if self.spread else 1.0
        return min(MAX_TOKENS, max(1, round(mean * factor)))


def scale_rate(arrivals: list[Arrival], factor: float) -> list[Arrival]:
    """Return the same requests, `factor` times as many a second."""
    if not 0 < factor < math.inf:
        raise ValueError(f"a rate can be scaled by a number above zero, not by {factor}")
    return [Arrival(a.time / factor, a.input_tokens, a.output_tokens, a.blocks) for a in arrivals]
