"""Tells rounding from an error, where runs in bfloat16 part.

Greedy decoding picks the largest logit, and runs that batch or cut a sequence differently round
differently. If every computed logit is within e of the exact one, the token that a run picks is
within 2 e of the exact best, whatever the run. So a token farther from it is an error: a wrong KV
page, a token lost or told twice. The exact logits are taken in float32, behind the very tokens of
the run, so that one rounding does not excuse what follows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.faults.streams import Reference, TokenIds

BFLOAT16_ERROR = 0.05
"""e for the tests' checkpoint: over 1500 positions no logit of transformers' own bfloat16 forward
was farther from float32 (with the same rounded weights) than 0.046, and the mean was 0.004. The
best two logits are 0.14 to 0.2 apart in the median."""


def gaps(reference: Reference, prompt: TokenIds, output: TokenIds) -> list[float]:
    """Return by how much the logit of each output token is below the best at its position."""
    logits = reference.all_logits(prompt + output[:-1])[len(prompt) - 1 :]
    best = logits.max(dim=-1).values
    chosen = logits[range(len(output)), list(output)]
    return [float(gap) for gap in best - chosen]


def errors(reference: Reference, prompt: TokenIds, output: TokenIds) -> list[int]:
    """Return the positions of an output that rounding in bfloat16 does not explain."""
    return [
        position
        for position, gap in enumerate(gaps(reference, prompt, output))
        if gap > 2 * BFLOAT16_ERROR
    ]


def parting(one: TokenIds, other: TokenIds) -> int | None:
    """Return the first position at which two outputs of the same length differ."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
