"""The check for bfloat16 lets a near tie pass, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.integration.faults.near_tie import BFLOAT16_ERROR, errors, gaps, parting
from tests.integration.faults.streams import Reference, prompt

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.faults.streams import TokenIds

COUNT = 80
PROMPT = prompt(400, 150)


@pytest.fixture(scope="module")
def rounded(model: Path) -> Reference:
    return Reference(model, rounded_to=torch.bfloat16)


def runner_up(rounded: Reference, output: TokenIds, position: int) -> TokenIds:
    """Return the output with the second best token at `position`, greedy behind it."""
    behind = PROMPT + output[:position]
    second = int(rounded.all_logits(behind)[-1].topk(2).indices[1])
    taken = (*output[:position], second)
    return taken + rounded.greedy(PROMPT + taken, COUNT - len(taken))


def margins(rounded: Reference, output: TokenIds) -> torch.Tensor:
    """Return how far the best two logits are apart at each position."""
    best = rounded.all_logits(PROMPT + output[:-1])[len(PROMPT) - 1 :].topk(2).values
    return best[:, 0] - best[:, 1]


def test_a_near_tie_passes_and_the_nearest_beyond_it_does_not(rounded: Reference) -> None:
    output = rounded.greedy(PROMPT, COUNT)
    assert errors(rounded, PROMPT, output) == []
    by_margin = margins(rounded, output)[:-1].sort()
    near = by_margin.values <= 2 * BFLOAT16_ERROR
    tie, clear = by_margin.indices[0], by_margin.indices[~near][0]
    assert near[0]
    other = runner_up(rounded, output, int(tie))
    assert parting(output, other) == tie
    assert errors(rounded, PROMPT, other) == [], "it is greedy behind the tie"
    wrong = runner_up(rounded, output, int(clear))
    assert parting(output, wrong) == clear
    assert errors(rounded, PROMPT, wrong) == [clear]


@pytest.mark.parametrize("page", range(0, 144, 48))
def test_a_wrong_page_does_not_pass(rounded: Reference, page: int) -> None:
    foreign = PROMPT[:page] + prompt(401, 16) + PROMPT[page + 16 :]
    assert errors(rounded, PROMPT, rounded.greedy(foreign, COUNT))


def test_a_token_lost_or_told_twice_does_not_pass(rounded: Reference) -> None:
    output = rounded.greedy(PROMPT, COUNT)
    assert errors(rounded, PROMPT, output[:40] + output[41:])
    assert errors(rounded, PROMPT, output[:40] + output[39:-1])


def test_gaps_are_those_of_each_position_alone(rounded: Reference) -> None:
    output = prompt(402, 5)
    for i, gap in enumerate(gaps(rounded, PROMPT, output)):
        logits = rounded.all_logits(PROMPT + output[:i])[-1]
        assert gap == pytest.approx(float(logits.max() - logits[output[i]]), abs=1e-4)
