"""How long a step takes: t = c + gamma L + b x + a (2 L x + x²), learned from the steps that ran.

One chunk computes x new tokens behind L cached ones. c is what a step costs whatever is in it,
gamma L reads the cached prefix, b x is the linear layers, and a (2 L x + x²) attention: twice the
pairs that x new tokens see. Several chunks in one step share one c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from penstock_runtime.scheduler.nonnegative import solve_nonnegative
from penstock_wire.messages import CostCoefficients

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Vector: TypeAlias = tuple[float, float, float, float]
"""One number for each of c, gamma, b, a."""


class Chunk(NamedTuple):
    """`length` new tokens at positions [start, start + length) of one sequence."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The coefficients of the formula above, in seconds; none is negative."""

    c: float
    gamma: float
    b: float
    a: float

    def __post_init__(self) -> None:
        for value in (self.c, self.gamma, self.b, self.a):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"cost coefficients are finite and not negative: {self}")

    def step(self, chunks: Iterable[Chunk]) -> float:
        """Return the seconds of one step that computes all of `chunks`; 0 for none."""
        features = _features(chunks)
        return _dot(self.vector(), features) if features[2] else 0.0

    def chunk(self, start: int, length: int) -> float:
        """Return the seconds of a step with one chunk."""
        return self.step([Chunk(start, length)])

    def work(self, start: float, end: float) -> float:
        """Return the seconds of tokens [start, end) that no way of chunking saves.

        It is additive: work(x, y) + work(y, z) = work(x, z).
        """
        return (end - start) * (self.b + self.a * (start + end))

    def tokens_within(self, start: float, seconds: float) -> float:
        """Return how many tokens at `start` take `seconds` besides c: the root of a quadratic.

        Not negative; infinite if tokens cost nothing, or `seconds` is infinite.
        """
        if math.isinf(seconds):
            return math.inf
        budget = seconds - self.gamma * start
        if budget <= 0:
            return 0.0
        linear = self.b + 2 * self.a * start
        root = math.sqrt(linear * linear + 4 * self.a * budget)
        # The form that neither cancels for a small `a` nor divides by a zero one.
        return 2 * budget / (linear + root) if linear + root > 0 else math.inf

    def to_wire(self, error: float = 0.0) -> CostCoefficients:
        """Return what is published; `error` is relative."""
        return CostCoefficients(c=self.c, gamma=self.gamma, b=self.b, a=self.a, error=error)

    @classmethod
    def from_wire(cls, published: CostCoefficients) -> Cost:
        """Return a peer's coefficients. Raises ValueError if one is negative or not finite."""
        return cls(published.c, published.gamma, published.b, published.a)

    def vector(self) -> Vector:
        """Return (c, gamma, b, a)."""
        return (self.c, self.gamma, self.b, self.a)


DEFAULT_COST = Cost(c=1e-2, gamma=5e-8, b=1e-4, a=1.7e-9)
"""Only the proportions matter, the first step sets the size: a step costs as much as 100 tokens,
and attention equals the linear layers at a context of 30,000."""


class CostModel:
    """Cost, fitted online by recursive least squares with a forgetting factor.

    What is minimised is the sum of squared *relative* errors over coefficients that are not
    negative. The information matrix is kept (not its inverse, the covariance), in units in which
    the seed is (1, 1, 1, 1), so that it is well scaled for any hardware. A new observation makes
    older ones forgotten only in its own direction (Cao and Schwartz, A directional forgetting
    algorithm based on the decomposition of the information matrix, Automatica 36, 2000): what was
    learned of long prompts is still known after an hour of short ones, and nothing winds up.

    A measurement further off than `OUTLIER` times the usual error counts as one that is only that
    far off (Huber): a process that was paused for a minute moves the model by little. But when
    most errors have one sign, something changed for good, and the past is forgotten faster: in all
    directions if steps differ, and in their own if each is like the one before. Steps that only
    decode tell nothing of prompts, however long they take, and they can be many. (Where they made
    all be forgotten, a token of a prompt came to cost nothing, and streams waited for chunks ten
    times too long.)
    """

    PRIOR = 1e-3
    """Information in the seed, an observation having at most 1: it decides only what no
    observation does."""
    TRIAL = 10
    """Steps until an outlier can be told from a seed that is far off."""
    OUTLIER = 3.0
    LEAST_SPREAD = 0.02
    """Relative; measurements are never trusted further than this."""
    SPREAD_MEMORY = 0.05
    BIAS = 0.6
    """Share of the usual error that has one sign, beyond which it is not chance: three standard
    deviations of a mean with the weight SPREAD_MEMORY."""
    CHANGED = 0.8
    """Share of the information that is kept in a step after a lasting change."""
    ALIKE = 0.99
    """Cosine of the angle between the parts of two steps, from which on they are alike."""
    ERROR_MEMORY = 0.05

    def __init__(self, seed: Cost | None = None, forgetting: float = 0.98) -> None:
        """Start from `seed`, whose size is trusted if it is given, from DEFAULT_COST if not."""
        if not 0 < forgetting <= 1:
            raise ValueError(f"a forgetting factor lies in (0, 1], not at {forgetting}")
        start = seed or DEFAULT_COST
        self._forgetting = forgetting
        # The first steps of a process are slow ones: the size is taken from the second.
        self._unsized_steps = 0 if seed is not None else 2
        # A coefficient seeded with 0 can still be learned: its unit follows from that of b.
        size = (start.b or DEFAULT_COST.b) / DEFAULT_COST.b
        self._unit = [
            value or size * default
            for value, default in zip(start.vector(), DEFAULT_COST.vector(), strict=True)
        ]
        self._solution = [v / u for v, u in zip(start.vector(), self._unit, strict=True)]
        self._cost: Cost | None = None
        """Of `_solution`, if it has been asked for."""
        self._information = _diagonal(self.PRIOR)
        self._spread = 1.0
        self._bias = 0.0
        self._last: Sequence[float] = (0.0,) * 4
        """The row of the step before."""
        self.samples = 0
        self.error = 0.0
        """A moving mean of |predicted - measured| / measured, predicted before learning from it."""

    @property
    def cost(self) -> Cost:
        """The coefficients as of now."""
        if self._cost is None:
            self._cost = Cost(*(u * s for u, s in zip(self._unit, self._solution, strict=True)))
        return self._cost

    def export(self) -> CostCoefficients:
        """Return the coefficients and their relative error for the wire."""
        return self.cost.to_wire(self.error)

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Learn from one step that computed `chunks` in `seconds`.

        Nothing is learned from a step without tokens, or a time no clock can have measured.
        """
        features = _features(chunks)
        if not features[2] or not 1e-7 <= seconds <= 1e7:
            return
        parts = [u * f for u, f in zip(self._unit, features, strict=True)]
        predicted = _dot(self._solution, parts)
        if self._unsized_steps or predicted <= 0:
            self._unsized_steps = max(0, self._unsized_steps - 1)
            parts, predicted = self._take_size(parts, seconds), seconds
        self._note_error(predicted, seconds)
        ratio = self._without_outlier(seconds / predicted)
        self._update([p / predicted for p in parts], ratio)
        self._cost = None
        self.samples += 1

    def _take_size(self, parts: list[float], seconds: float) -> list[float]:
        """Start over with the seed's proportions, so scaled that `parts` take `seconds`."""
        factor = seconds / sum(parts)
        self._unit = [u * factor for u in self._unit]
        self._solution = [1.0] * 4
        self._information = _diagonal(self.PRIOR)
        return [part * factor for part in parts]

    def _note_error(self, predicted: float, seconds: float) -> None:
        error = abs(predicted - seconds) / seconds
        # A plain mean at first, so that the very first steps do not linger.
        weight = max(self.ERROR_MEMORY, 1 / (self.samples + 1))
        self.error += weight * (error - self.error)

    def _without_outlier(self, ratio: float) -> float:
        limit = self.OUTLIER * self._spread if self.samples >= self.TRIAL else math.inf
        deviation = max(-limit, min(limit, ratio - 1))
        weight = max(self.SPREAD_MEMORY, 1 / (self.samples + 2))
        self._spread += weight * (abs(deviation) - self._spread)
        self._bias += weight * (deviation - self._bias)
        self._spread = max(self.LEAST_SPREAD, min(1.0, self._spread))
        return 1 + deviation

    def _update(self, row: list[float], value: float) -> None:
        """Move to the least point of the old information's distance and the new squared error."""
        solution = self._solution
        forgetting = self._forgetting
        if self.samples >= self.TRIAL and abs(self._bias) > self.BIAS * self._spread:
            if _cosine(row, self._last) > self.ALIKE:
                forgetting = min(forgetting, self.CHANGED)
            else:
                self._forget()
        self._last = row
        information = self._information
        along = [_dot(line, row) for line in information]
        # What is taken away along the row, as a share of what is known there.
        share = (1 - forgetting) / _dot(along, row)
        kept = [
            [known - share * taken * other for known, other in zip(line, along, strict=True)]
            for line, taken in zip(information, along, strict=True)
        ]
        vector = [
            _dot(line, solution) + given * value for line, given in zip(kept, row, strict=True)
        ]
        self._information = [
            [known + given * other for known, other in zip(line, row, strict=True)]
            for line, given in zip(kept, row, strict=True)
        ]
        # Stage 0 does this for every stage in every step, and mostly no coefficient is at zero.
        self._solution = _solve_positive(self._information, vector) or solve_nonnegative(
            self._information, vector
        )

    def _forget(self) -> None:
        known = sum(self._information[i][i] for i in range(4))
        if known > 4 * self.PRIOR:
            self._information = [[self.CHANGED * x for x in line] for line in self._information]


def _features(chunks: Iterable[Chunk]) -> Vector:
    cached = tokens = pairs = 0
    for start, length in chunks:
        cached += start
        tokens += length
        pairs += length * (2 * start + length)
    return (1.0, float(cached), float(tokens), float(pairs))


def _solve_positive(
    matrix: Sequence[Sequence[float]], vector: Sequence[float]
) -> list[float] | None:
    """Solve a system of four unknowns, or return None unless all of them come out positive.

    Such a solution is the one that `solve_nonnegative` would find. By elimination, without loops;
    None as well if a pivot is so small that it needs the other's care.
    """
    (a, e, f, g), (_, b, h, i), (_, _, c, j), (_, _, _, d) = matrix
    p, q, r, s = vector
    least = 1e-10
    pivots = (least * a, least * b, least * c, least * d)
    x, y, z = e / a, f / a, g / a
    b, h, i, q = b - x * e, h - x * f, i - x * g, q - x * p
    c, j, r = c - y * f, j - y * g, r - y * p
    d, s = d - z * g, s - z * p
    if b <= pivots[1]:
        return None
    y, z = h / b, i / b
    c, j, r = c - y * h, j - y * i, r - y * q
    d, s = d - z * i, s - z * q
    if c <= pivots[2]:
        return None
    z = j / c
    d, s = d - z * j, s - z * r
    if d <= pivots[3]:
        return None
    w = s / d
    v = (r - j * w) / c
    u = (q - h * v - i * w) / b
    t = (p - e * u - f * v - g * w) / a
    return [t, u, v, w] if min(t, u, v, w) > 0 else None


def _diagonal(value: float) -> list[list[float]]:
    return [[value if i == j else 0.0 for j in range(4)] for i in range(4)]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    p, q, r, s = left
    t, u, v, w = right
    return p * t + q * u + r * v + s * w


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    sizes = _dot(left, left) * _dot(right, right)
    return _dot(left, right) / math.sqrt(sizes) if sizes > 0 else 0.0
