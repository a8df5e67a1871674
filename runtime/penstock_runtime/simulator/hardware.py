"""How long things take on the hardware that is simulated.

The scheduler believes t = c + gamma L + b x + a (2 L x + x²). The hardware here may differ from
that belief in what real hardware differs in: linear layers that are not saturated by few tokens,
stages that are not alike, noise, and links that take time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.scheduler.cost_model import Chunk, Cost


@dataclass(frozen=True, slots=True)
class StageModel:
    """The time of one stage's steps.

    The linear layers take b hypot(x, saturation) instead of b x: few tokens are bound by reading
    the weights, many by arithmetic, and `saturation` is where both are equal (a roofline with a
    smooth knee). So a step that is not large costs more a token; much larger ones do not notice.
    """

    cost: Cost
    saturation: float = 0.0
    """Tokens."""

    def seconds(self, chunks: Sequence[Chunk]) -> float:
        """Return the seconds of one step; 0 for none."""
        tokens = sum(chunk.length for chunk in chunks)
        if not tokens:
            return 0.0
        unsaturated = math.hypot(tokens, self.saturation) - tokens
        return self.cost.step(chunks) + self.cost.b * unsaturated


@dataclass(frozen=True, slots=True)
class Link:
    """A connection that carries one message after another."""

    bandwidth: float = math.inf
    """Bytes a second."""
    latency: float = 0.0
    """Seconds, besides; the next message can follow at once."""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and 0 <= self.latency < math.inf):
            raise ValueError(f"no such link: {self}")

    def seconds(self, size: float) -> float:
        """Return how long `size` bytes occupy the link."""
        return size / self.bandwidth


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One prefill group."""

    stages: tuple[StageModel, ...]
    activations: Link = Link()
    """From each stage to the next."""
    activation_bytes: float = 0.0
    """A token: hidden size times bytes an element."""
    kv: Link = Link()
    """From each stage to the decode workers, both ways alike."""
    kv_bytes: float = 0.0
    """A token and stage."""
    control_latency: float = 0.0
    """Seconds that a control message takes between stage 0 and the others."""
    ring_slots: int = 4
    """Hand-overs between two stages that may be under way."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""

    def __post_init__(self) -> None:
        if not self.stages or self.ring_slots < 1 or self.noise < 0 or self.control_latency < 0:
            raise ValueError(f"no such group: {self}")

    @classmethod
    def uniform(cls, stages: int, model: StageModel, **options: object) -> Hardware:
        """Return a group of equal stages."""
        return cls(stages=(model,) * stages, **options)  # type: ignore[arg-type]
