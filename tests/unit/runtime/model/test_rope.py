"""Rotary positions: properties that the parity tests do not pin down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.model.rope import (
    RopeConfig,
    frequencies,
    interleave_rows,
    rotate_,
    rotations,
    yarn_attention_factor,
)


def turned(x: torch.Tensor, positions: list[int], rope: RopeConfig) -> torch.Tensor:
    out = x.clone()
    steps = frequencies(rope, x.shape[-1])
    rotate_(out, rotations(torch.tensor(positions), steps, rope.attention_factor))
    return out


@given(shift=st.integers(0, 1000), distance=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_scores_depend_on_the_distance_alone(shift, distance):
    q, k = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    rope = RopeConfig()

    def score(p):
        return (turned(q, [p + distance], rope) * turned(k, [p], rope)).sum(-1)

    torch.testing.assert_close(score(shift), score(0), atol=2e-3, rtol=1e-3)


def test_interleaved_pairs_turn_like_halves():
    """Element i of the checkpoint's order is paired with i + H/2."""
    weight = torch.arange(2 * 6.0)[:, None].expand(-1, 3)
    assert interleave_rows(weight, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave_rows(torch.arange(4.0), 4).tolist() == [0, 2, 1, 3]


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    base = frequencies(RopeConfig(theta=500000.0), 128)
    scaled = frequencies(
        RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_context=8192), 128
    )
    turns = 8192 * base / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], base[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], base[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (scaled[between] < base[between]).all()
    assert (scaled[between] > base[between] / 8).all()


def test_yarn_ramps_from_kept_to_stretched():
    base = frequencies(RopeConfig(theta=10000.0), 128)
    scaled = frequencies(RopeConfig(kind="yarn", factor=4.0, original_context=4096), 128)
    ratio = base / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(4)
    assert (ratio.diff() >= -1e-5).all()


def test_yarn_ramp_of_no_width_is_a_step():
    rope = RopeConfig(
        kind="yarn", factor=2.0, original_context=64, beta_fast=1, beta_slow=1, truncate=False
    )
    assert frequencies(rope, 16).isfinite().all()


def test_yarn_attention_factor():
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0
    assert yarn_attention_factor(40.0, 0.707, 0.5) == pytest.approx(1.0645, abs=1e-4)
