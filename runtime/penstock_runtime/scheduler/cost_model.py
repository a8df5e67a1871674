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
    from collections.abc import Iterable

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
        return _dot(self._vector(), features) if features[2] else 0.0

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

    def _vector(self) -> Vector:
        return (self.c, self.gamma, self.b, self.a)


DEFAULT_COST = Cost(c=1e-2, gamma=5e-8, b=1e-4, a=1.7e-9)
"""Only the proportions matter, the first step sets the size: a step costs as much as 100 tokens,
and attention equals the linear layers at a context of 30,000."""


class CostModel:
    """Cost, fitted online by recursive least squares with a forgetting factor.

    What is minimised is the weighted sum of squared *relative* errors, an observation k steps ago
    weighing `forgetting`^k, over coefficients that are not negative. The normal equations are kept
    (the information form), in units in which the seed is (1, 1, 1, 1), so that they are well
    scaled for any hardware. Each solution is also pulled, with the weight `INERTIA`, towards the
    one before: a direction in which nothing was observed for long keeps its last value, and the
    estimate cannot wind up.

    A measurement further off than `OUTLIER` times the usual error counts as one that is only that
    far off (Huber): a process that was paused for a minute moves the model by little, while a
    lasting change widens the usual error and is followed within tens of steps.
    """

    INERTIA = 1e-3
    OUTLIER = 3.0
    LEAST_SPREAD = 0.02
    """Relative; measurements are never trusted further than this."""
    SPREAD_MEMORY = 0.05
    ERROR_MEMORY = 0.05

    def __init__(self, seed: Cost | None = None, forgetting: float = 0.99) -> None:
        """Start from `seed`, whose size is trusted if it is given, from DEFAULT_COST if not."""
        if not 0 < forgetting <= 1:
            raise ValueError(f"a forgetting factor lies in (0, 1], not at {forgetting}")
        seed_or_default = seed or DEFAULT_COST
        self._forgetting = forgetting
        self._sized = seed is not None
        # A coefficient seeded with 0 can still be learned: its unit comes from the default one.
        self._unit: Vector = tuple(  # type: ignore[assignment]
            value or default
            for value, default in zip(_vector(seed_or_default), _vector(DEFAULT_COST), strict=True)
        )
        self._solution = [v / u for v, u in zip(_vector(seed_or_default), self._unit, strict=True)]
        self._information = [[0.0] * 4 for _ in range(4)]
        self._target = [0.0] * 4
        self._spread = 1.0
        self.samples = 0
        self.error = 0.0
        """A moving mean of |predicted - measured| / measured, predicted before learning from it."""

    @property
    def cost(self) -> Cost:
        """The coefficients as of now."""
        return Cost(*(u * s for u, s in zip(self._unit, self._solution, strict=True)))

    def export(self) -> CostCoefficients:
        """Return the coefficients and their relative error for the wire."""
        return self.cost.to_wire(self.error)

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Learn from one step that computed `chunks` in `seconds`; an empty step is ignored."""
        features = _features(chunks)
        if not features[2] or not math.isfinite(seconds) or seconds <= 0:
            return
        if not self._sized:
            self._set_size(seconds / _dot(_vector(self.cost), features))
        predicted = _dot(_vector(self.cost), features)
        if predicted <= 0:
            # All that these features touch was learned to be free: start over at this size.
            self._solution = [1.0] * 4
            self._set_size(seconds / _dot(_vector(self.cost), features))
            predicted = seconds
        self._note_error(predicted, seconds)
        ratio = self._without_outlier(seconds / predicted)
        self._accumulate(
            [u * f / predicted for u, f in zip(self._unit, features, strict=True)], ratio
        )
        self._solve()
        self.samples += 1

    def _set_size(self, factor: float) -> None:
        self._unit = tuple(u * factor for u in self._unit)  # type: ignore[assignment]
        self._information = [[0.0] * 4 for _ in range(4)]
        self._target = [0.0] * 4
        self._sized = True

    def _note_error(self, predicted: float, seconds: float) -> None:
        error = abs(predicted - seconds) / seconds
        # A plain mean at first, so that the very first steps do not linger.
        weight = max(self.ERROR_MEMORY, 1 / (self.samples + 1))
        self.error += weight * (error - self.error)

    def _without_outlier(self, ratio: float) -> float:
        limit = self.OUTLIER * self._spread
        deviation = max(-limit, min(limit, ratio - 1))
        weight = max(self.SPREAD_MEMORY, 1 / (self.samples + 2))
        self._spread += weight * (abs(deviation) - self._spread)
        self._spread = max(self.LEAST_SPREAD, min(1.0, self._spread))
        return 1 + deviation

    def _accumulate(self, row: list[float], value: float) -> None:
        for i, left in enumerate(row):
            self._target[i] = self._forgetting * self._target[i] + left * value
            for j, right in enumerate(row):
                self._information[i][j] = self._forgetting * self._information[i][j] + left * right

    def _solve(self) -> None:
        matrix = [row.copy() for row in self._information]
        vector = self._target.copy()
        for i, previous in enumerate(self._solution):
            # Per coefficient in proportion to its own information, so that it slows none down.
            inertia = self.INERTIA * min(1.0, self._information[i][i]) + 1e-9
            matrix[i][i] += inertia
            vector[i] += inertia * previous
        self._solution = solve_nonnegative(matrix, vector)


def _features(chunks: Iterable[Chunk]) -> Vector:
    cached = tokens = pairs = 0
    for start, length in chunks:
        cached += start
        tokens += length
        pairs += length * (2 * start + length)
    return (1.0, float(cached), float(tokens), float(pairs))


def _vector(cost: Cost) -> Vector:
    return (cost.c, cost.gamma, cost.b, cost.a)


def _dot(left: Vector, right: Vector) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))
