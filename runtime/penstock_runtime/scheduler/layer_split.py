"""Which layers each stage of a pipeline gets: the slowest stage is what a pipeline's speed is.

A border may lie within a layer, behind its attention. It is written as a half: stages of 8.5 and
7.5 layers share the layer 8. Halves matter where there are few layers a stage: 60 whole layers on
eight stages leave some with 8, 7 % above the mean.
"""

from __future__ import annotations

import argparse
import math
import re
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST = 1024
"""Layers of a stage, as in the manifest."""
_LEAST = 2
"""Halves of a stage: so there is an attention among them, and KV for its pages."""


def layer_counts(text: str) -> tuple[float, ...]:
    """Read the layers of each stage from a command line. Raises ArgumentTypeError."""
    written = re.fullmatch(r"[1-9]\d*(\.[05])?(,[1-9]\d*(\.[05])?)*", text)
    counts = tuple(map(float, text.split(","))) if written else ()
    if not counts or max(counts) > _MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layers, in halves and at least one a stage: 8.5,7.5"
        )
    return counts


def split_layers(
    costs: Sequence[float], stages: int, embed_cost: float = 0.0
) -> list[tuple[float, float]]:
    """Divide layers among stages so that the slowest stage is as fast as possible.

    Args:
        costs: of every layer its attention's, then its feed-forward's, in any unit.
        stages: P; each gets at least one layer, or the halves of two.
        embed_cost: what the first stage spends on embedding besides.

    Returns:
        Half-open ranges in layers, one a stage. Among the fastest divisions the most even one
        (least sum of squares).

    Raises:
        ValueError: if there are fewer layers than stages, or a cost is missing or negative.
    """
    halves = len(costs)
    if halves % 2 or embed_cost < 0 or min(costs, default=0.0) < 0:
        raise ValueError("every layer needs two costs, none of them negative")
    if not 1 <= stages <= halves // 2:
        raise ValueError(f"{halves // 2} layers cannot be divided among {stages} stages")
    sums = [0.0, *accumulate(costs)]

    def load(first: int, last: int) -> float:
        return sums[last] - sums[first] + (embed_cost if first == 0 else 0.0)

    slowest = _slowest_stage(halves, stages, load)
    borders = _most_even(halves, stages, load, slowest * (1 + 1e-9))
    return [(a / 2, b / 2) for a, b in pairwise(borders)]


def half_costs(
    counts: Sequence[float],
    linear: Sequence[float],
    attention: Sequence[float],
    attention_share: float,
) -> list[float]:
    """Return what each half of a layer costs, by what stages measured that hold `counts` of them.

    Layers of one stage are taken to be alike, but for the model's last one: of it only keys and
    values are computed, which is taken for nothing. What differs from stage to stage is taken to be
    the layers', so stages should run on machines of one kind.

    Args:
        counts: layers of each stage, in halves.
        linear: seconds of each stage for one and the same chunk, of what grows with its length.
        attention: of what grows with its length times its context.
        attention_share: part of a layer's linear seconds that its attention's projections take.

    Raises:
        ValueError: if there is no time for each stage, or the counts are not of whole halves.
    """
    if not len(counts) == len(linear) == len(attention) or min(counts, default=0) < 1:
        raise ValueError(f"{len(linear)} times do not describe stages of {list(counts)} layers")
    borders = [0, *accumulate(round(2 * count) for count in counts)]
    if borders[-1] % 2 or borders[-1] != 2 * sum(counts):
        raise ValueError(f"{list(counts)} are not layers and halves of a model")
    computed = borders[-1] - 2
    costs = [0.0] * borders[-1]
    for stage, (first, last) in enumerate(pairwise(borders)):
        held = range(first, min(last, computed))
        attentions = sum(half % 2 == 0 for half in held)
        feed_forwards = len(held) - attentions
        shares = attentions * attention_share + feed_forwards * (1 - attention_share)
        for half in held:
            if half % 2:
                costs[half] = linear[stage] * (1 - attention_share) / shares
            else:
                costs[half] = (
                    linear[stage] * attention_share / shares + attention[stage] / attentions
                )
    return costs


def _slowest_stage(halves: int, stages: int, load: Callable[[int, int], float]) -> float:
    """Return the least possible time of the slowest stage, by dynamic programming."""
    # best[n]: halves [0, n) on the stages so far.
    best = [math.inf] * _LEAST + [load(0, n) for n in range(_LEAST, halves + 1)]
    for _ in range(stages - 1):
        best = [
            min((max(best[m], load(m, n)) for m in range(_LEAST, n - _LEAST + 1)), default=math.inf)
            for n in range(halves + 1)
        ]
    return best[halves]


def _most_even(
    halves: int, stages: int, load: Callable[[int, int], float], limit: float
) -> list[int]:
    """Return the borders between stages none of which is above `limit`, of least squared times."""

    def square(first: int, last: int) -> float:
        seconds = load(first, last)
        return seconds * seconds if seconds <= limit else math.inf

    best = [math.inf] * _LEAST + [square(0, n) for n in range(_LEAST, halves + 1)]
    before: list[list[int]] = []
    for _ in range(stages - 1):
        chosen = [
            min(
                ((best[m] + square(m, n), m) for m in range(_LEAST, n - _LEAST + 1)),
                default=(math.inf, 0),
            )
            for n in range(halves + 1)
        ]
        best = [total for total, _ in chosen]
        before.append([m for _, m in chosen])
    borders = [halves]
    for known in reversed(before):
        borders.append(known[borders[-1]])
    return [0, *reversed(borders)]
