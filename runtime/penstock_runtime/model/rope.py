"""Rotary position embedding: the frequencies, and the rotation.

A head of H elements is H/2 planes; at position p plane i turns by the angle p * f_i with
f_i = theta^(-2i/H) (Su et al., "RoFormer", arXiv 2104.09864). Scaled variants change f_i only, and
yarn also multiplies q and k by a constant.

Hugging Face checkpoints pair element i with element i + H/2. Here the rows of the q and k
projections are reordered at load (`interleave_rows`), so that a pair lies side by side and is one
complex number: the rotation of q and k is then a single multiplication. Scores q·k do not change,
because q and k are reordered alike. Keys in the pool are in this order too.

Left out: frequencies that depend on the length of the sequence at hand ("longrope", and "dynamic"
beyond the trained length): keys already in the cache would have to be turned again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

RopeKind: TypeAlias = Literal["default", "dynamic", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """How positions become angles. Fields beyond `theta` matter to the kinds that name them."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """linear, llama3, yarn: by how much the context was stretched."""
    original_context: int = 0
    """llama3, yarn: tokens of context before stretching."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are left alone."""
    beta_fast: float = 32.0
    """yarn: planes that turn more often than this in the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: planes that turn less often than this are stretched fully."""
    truncate: bool = True
    """yarn: round the borders of the ramp outwards to whole planes."""
    attention_factor: float = 1.0
    """yarn: multiplies q and k."""


def frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the angle a position adds to each plane, float32 (head_dim / 2,), in radians."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "default" | "dynamic":
            return base
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(rope, base)
        case "yarn":
            return _yarn(rope, base, head_dim)


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Stretch long wavelengths, keep short ones, blend between.

    With w = 2π / f and s = (original_context / w - low) / (high - low) clamped to [0, 1], the
    frequency is s·f + (1 - s)·f / factor. Source: the Llama 3.1 reference implementation.
    """
    turns = rope.original_context * base / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * base + (1 - keep) * base / rope.factor


def _yarn(rope: RopeConfig, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Stretch planes that turn slowly, keep those that turn fast, a linear ramp over the index.

    Plane i turns r times in the original context when i = H·ln(context / 2πr) / (2·ln theta).
    Source: Peng et al., "YaRN", arXiv 2309.00071, section 3.2.
    """

    def plane(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp; the width is too small to matter
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    stretch = ((index - low) / (high - low)).clamp(0, 1)
    return stretch * base / rope.factor + (1 - stretch) * base


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Return yarn's multiplier of q and k, 0.1·ln(factor) + 1 (arXiv 2309.00071, equation 22).

    DeepSeek's checkpoints give two weights of the logarithm; the multiplier is then their ratio.
    """

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def rotations(
    positions_T: torch.Tensor, frequencies: torch.Tensor, magnitude: float
) -> torch.Tensor:
    """Return the complex factors magnitude · e^(i·p·f), complex64 (T, 1, H/2).

    Angles are float32: at a million tokens their error is 0.06 radians in the fastest plane, as in
    the implementations that the models were trained with. What is made of them is rounded from
    float64, so that it is the same in every library; the C++ kernels do likewise (layers.cpp).
    """
    angles = (positions_T.to(torch.float32)[:, None] * frequencies).double()
    # Filled on the device: a copy from the host could not be part of a CUDA graph.
    turns = torch.polar(torch.full_like(angles, magnitude), angles)
    return turns.to(torch.complex64)[:, None, :]


@dataclass(frozen=True, slots=True)
class RopeTable:
    """The rotations of a batch as kernels take them: a table of cosines and sines, and its rows."""

    cos_sin: torch.Tensor
    """float32 (T, H): H/2 cosines, then H/2 sines; row t is that of the batch's token t."""
    rows: torch.Tensor
    """int32 (T,): 0, 1, 2, …; a table of the batch alone serves any length and kind of scaling."""

    @classmethod
    def of(cls, rotations_T1P: torch.Tensor) -> RopeTable:
        """Return the table of `rotations`."""
        planes = rotations_T1P[:, 0]
        return cls(
            torch.cat([planes.real, planes.imag], dim=-1),
            torch.arange(len(planes), dtype=torch.int32, device=planes.device),
        )


def rotate_(x_TNH: torch.Tensor, rotations_T1P: torch.Tensor) -> None:
    """Turn every pair of x in place. x: float32 (T, N, H), pairs side by side, rows contiguous."""
    tokens, heads, head_dim = x_TNH.shape
    pairs = x_TNH.view(tokens, heads, head_dim // 2, 2)
    torch.view_as_complex(pairs).mul_(rotations_T1P)


def interleave_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return `weight` with each head's rows (i, i + H/2) brought together.

    weight: (heads · H, ...) or (H,).
    """
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
