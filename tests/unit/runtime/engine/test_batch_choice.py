"""Rows chosen together get the tokens that they get alone."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.engine import batch_choice
from penstock_runtime.engine.sampler import SamplingRow, sample
from penstock_wire.messages import Sampling

samplings = st.builds(
    Sampling,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 30, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.11, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logprobs=st.sampled_from([None, None, 2]),
)


def row(sampling: Sampling, position: int) -> SamplingRow:
    return SamplingRow(sampling, array("i", range(position)), 0, position)


@given(
    rows=st.lists(st.builds(row, samplings, st.integers(0, 40)), min_size=1, max_size=40),
    vocabulary=st.integers(1, 60),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_together_is_as_alone(
    rows: list[SamplingRow], vocabulary: int, ties: bool, seed: int
) -> None:
    logits = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    if ties:
        logits = logits.round()
    logits[:, 1::7] = -torch.inf
    assert sample(logits, rows, together=True) == sample(logits, rows, together=False)


def test_neighbours_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(33, 200, generator=torch.Generator().manual_seed(3))
    rows = [
        row(Sampling(seed=i, temperature=1.0, top_p=0.9, top_k=50 * (i % 2)), 4) for i in range(33)
    ]
    together = [token.id for token in sample(logits, rows, together=True)]
    alone = [
        sample(logits[i : i + 1], rows[i : i + 1], together=True)[0].id for i in range(len(rows))
    ]
    assert together == alone
    monkeypatch.setattr(batch_choice, "_ROWS", 5)
    assert [token.id for token in sample(logits, rows, together=True)] == together


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_are_tokens(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    choice = batch_choice.Choice(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=uniform)
    assert batch_choice.choose_together(logits, [choice]).tolist() == [2 if uniform else 1]
