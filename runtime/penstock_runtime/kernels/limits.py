"""What this processor can do at most, with torch's threads: what the kernels are held against."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.memory import large_empty

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.kernels.native import Kernels

_REPEATS = 2_000_000
"""Some ten milliseconds of multiply-adds."""
_READ_BYTES = 512 * 2**20
"""Far more than the last cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Rates by all threads together, the best of several tries."""

    float32_gflops: float
    """Multiply-adds on registers, two operations each, in 10⁹ a second."""
    bfloat16_gflops: float | None
    """The same of products of bfloat16 pairs; None where they would be emulated."""
    read_gbytes: float
    """Reading memory once, in 10⁹ bytes a second."""


def measure_limits(kernels: Kernels, seconds: float = 0.5) -> Limits:
    """Measure, for `seconds` each."""
    # Like weights and KV: in small pages a third less is read.
    memory = large_empty(_READ_BYTES, torch.uint8).fill_(1)
    pairs = None
    if kernels.multiplies_bfloat16:
        pairs = _best_rate(lambda: kernels.spin(_REPEATS, pairs=True), seconds)
    return Limits(
        float32_gflops=_best_rate(lambda: kernels.spin(_REPEATS), seconds),
        bfloat16_gflops=pairs,
        read_gbytes=_best_rate(lambda: kernels.read(memory), seconds),
    )


def _best_rate(work: Callable[[], float], seconds: float) -> float:
    """Return the highest of what `work` returns a second, in 10⁹."""
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        started = time.perf_counter()
        done = work()
        best = max(best, 1e-9 * done / (time.perf_counter() - started))
    return best
