"""Decoder layers that the library computes in one call.

Shape letters: T tokens of the batch, R rows of it that are wanted, D hidden size, N query heads,
K KV heads, H head dim.
"""

from __future__ import annotations

from ctypes import pointer
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.kernels.native import ELEMENTS, KvPages, check
from penstock_runtime.kernels.structures import (
    Attention,
    AttentionInputs,
    DecoderLayer,
    KvLayer,
    LastRows,
    Matrix,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.kernels.native import Kernels, Segments, TokenSlots, Weight


@dataclass(frozen=True, slots=True)
class Projection:
    """A packed weight, and its bias if there is one."""

    weight: Weight
    bias: torch.Tensor | None

    def matrix(self) -> Matrix:
        """Return it as the library takes it."""
        weight = self.weight
        return Matrix(
            weight.address, weight.kind, _address(self.bias), weight.outputs, weight.inputs
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """The first half of a layer; weights of norms are float32."""

    norm: torch.Tensor
    qkv: Projection
    head_norm: torch.Tensor | None
    """(N + K, H), or none."""
    output: Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForwardWeights:
    """The second half."""

    norm: torch.Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; None is the half that another stage has."""

    attention: AttentionWeights | None
    feed_forward: FeedForwardWeights | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersShape:
    """What all layers of a model have in common."""

    hidden: int
    heads: int
    head_dim: int
    epsilon: float
    """Of all norms."""
    frequencies: torch.Tensor
    """float32 (H / 2): pair i of a head is turned by position · frequencies[i]."""
    magnitude: float
    """What turned pairs are multiplied by."""
    dtype: torch.dtype
    """Whose precision hidden states have behind each half of a layer."""
    round_inputs: bool
    """As for `Kernels.attention`."""


@dataclass(frozen=True, slots=True)
class LastLayer:
    """The rows whose hidden states are wanted: of the last layer the others leave KV only."""

    rows: torch.Tensor
    """int64, rising."""
    segments: Segments | None
    """The same as segments of one token each; None if there is no row."""


class NativeLayers:
    """Layers [a, b) of a model, and the pages that they were last run with."""

    def __init__(
        self, kernels: Kernels, layers: Sequence[LayerWeights], shape: LayersShape
    ) -> None:
        self._kernels = kernels
        self._weights = list(layers)  # the library is given addresses only
        self._shape = shape
        check(shape.frequencies, "frequencies", (shape.head_dim // 2,))
        self._layers = (DecoderLayer * len(layers))(*map(_layer, layers))
        self._attention_layers = [
            made for made, given in zip(self._layers, layers, strict=True) if given.attention
        ]
        self._divides = shape.heads * shape.head_dim % kernels.columns_together == 0
        """Whether q can be computed apart from keys and values."""
        self._pool: tuple[object, ...] = ()
        self._pages: KvPages | None = None

    def run(
        self,
        x_TD: torch.Tensor,
        *,
        slots: TokenSlots,
        segments: Segments,
        kv_pool: torch.Tensor,
        last: LastLayer | None = None,
    ) -> torch.Tensor:
        """Return the hidden states behind the layers, float32 (T, D), or those wanted, (R, D).

        Args:
            x_TD: float32, in front of them; changed.
            slots: of the batch's tokens.
            segments: as for `Kernels.attention`.
            kv_pool: (pages, layers, 2, K, S, H).
            last: what is wanted; None: all rows.
        """
        shape, tokens = self._shape, len(x_TD)
        check(x_TD, "x", (tokens, shape.hidden))
        position_of, page_of, offset_of = slots.addresses_for(tokens)
        pages = self._lay_out(kv_pool)
        step = Step(
            x_TD.data_ptr(),
            tokens,
            shape.hidden,
            ELEMENTS[shape.dtype],
            shape.epsilon,
            position_of,
            shape.frequencies.data_ptr(),
            shape.magnitude,
            AttentionInputs(
                None,
                tokens,
                shape.heads,
                None,
                None,
                page_of,
                offset_of,
                shape.epsilon,
                KvLayer(),
            ),
            self._attention(segments, pages),
        )
        if last is None or not self._divides:
            self._kernels.layers(self._layers, step)
            return x_TD if last is None else x_TD[last.rows]
        x_RD = torch.empty(len(last.rows), shape.hidden)
        step.last = pointer(
            LastRows(
                x_RD.data_ptr(),
                last.rows.data_ptr(),
                len(x_RD),
                Attention() if last.segments is None else self._attention(last.segments, pages),
            )
        )
        self._kernels.layers(self._layers, step)
        return x_RD

    def _attention(self, segments: Segments, pages: KvPages) -> Attention:
        """Return what the library is told of a batch's attention in all layers."""
        shape = self._shape
        return Attention(
            None,
            0,
            None,
            shape.heads,
            *segments.addresses,
            shape.head_dim**-0.5,
            shape.round_inputs and pages.pairs,
            KvLayer(),
        )

    def _lay_out(self, kv_pool: torch.Tensor) -> KvPages:
        """Tell the layers where their pages are, unless they know, and return those of the last."""
        known = (kv_pool.data_ptr(), kv_pool.shape, kv_pool.stride(), kv_pool.dtype)
        if self._pages is None or known != self._pool:
            for index, layer in enumerate(self._attention_layers):
                self._pages = KvPages(*kv_pool[:, index].unbind(1))
                layer.kv = self._pages.layer
            self._pool = known
        assert self._pages is not None, "there is at least one layer's attention"
        return self._pages


def _layer(weights: LayerWeights) -> DecoderLayer:
    layer = DecoderLayer()
    if (attention := weights.attention) is not None:
        layer.attention_norm = attention.norm.data_ptr()
        layer.qkv = attention.qkv.matrix()
        layer.head_norm = _address(attention.head_norm)
        layer.output = attention.output.matrix()
    if (feed_forward := weights.feed_forward) is not None:
        layer.mlp_norm = feed_forward.norm.data_ptr()
        layer.gate_up = feed_forward.gate_up.matrix()
        layer.down = feed_forward.down.matrix()
    return layer


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
