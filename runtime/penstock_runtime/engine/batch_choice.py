"""Choosing a token for many rows at once, by the rules of `sampler`, without asking the device.

The sampler computes a row by itself, with several answers from the device a row. On a GPU each of
them costs as much as a kernel, so rows without penalties or biases are chosen together: the same
steps in the same order, each over all rows, in float64. Sums are formed in another order, so a row
whose random number falls within 1e-15 of a border may differ.

Every operation is along rows, so a row's neighbours do not matter to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROWS = 16
"""Rows at a time: float64 copies of their logits take memory, 20 MB each for 16 rows of 150,000."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What decides a row's token besides its logits."""

    temperature: float
    """Above 0."""
    top_k: int
    """0: all."""
    top_p: float
    min_p: float
    uniform: float
    """The row's random number, in [0, 1)."""


def choose_together(logits_RV: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Return the token of each row, int64 (R,), on the device of the logits.

    Args:
        logits_RV: of any floating type; the largest of each row is finite.
        choices: one a row, at least one.
    """
    return torch.cat(
        [
            _choose(logits_RV[at : at + _ROWS].double(), choices[at : at + _ROWS])
            for at in range(0, len(choices), _ROWS)
        ]
    )


def _choose(logits_RV: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    temperature = _column([choice.temperature for choice in choices], logits_RV)
    largest = logits_RV.max(dim=-1, keepdim=True).values
    weights_RV = ((logits_RV - largest) / temperature).exp()
    if any(choice.top_k or choice.min_p or choice.top_p < 1 for choice in choices):
        weights_RV = weights_RV * _kept(logits_RV, weights_RV, choices)
    cumulative_RV = weights_RV.cumsum(-1)
    total = cumulative_RV[:, -1:]
    uniform = _column([choice.uniform for choice in choices], logits_RV)
    # u · total can round up to total, which nothing exceeds.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative_RV, target, right=True)[:, 0]


def _kept(
    logits_RV: torch.Tensor, weights_RV: torch.Tensor, choices: Sequence[Choice]
) -> torch.Tensor:
    """Return 1 where top_k, min_p and top_p, in this order, leave a token, else 0; by id."""
    vocabulary = logits_RV.shape[-1]
    # Stable: lower ids first among equals.
    order_RV = logits_RV.sort(dim=-1, descending=True, stable=True).indices
    ordered_RV = weights_RV.gather(-1, order_RV)
    rank = torch.arange(vocabulary, device=logits_RV.device)
    kept_RV = rank < _column([choice.top_k or vocabulary for choice in choices], logits_RV)
    kept_RV &= ordered_RV >= _column([choice.min_p for choice in choices], logits_RV)
    left_RV = ordered_RV * kept_RV
    before_RV = left_RV.cumsum(-1) - left_RV
    share = _column([choice.top_p for choice in choices], logits_RV)
    nucleus_RV = before_RV < share * left_RV.sum(-1, keepdim=True)
    kept_RV &= nucleus_RV | (share >= 1) | (rank == 0)
    return torch.zeros_like(weights_RV).scatter_(-1, order_RV, kept_RV.to(weights_RV.dtype))


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
