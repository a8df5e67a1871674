"""Layers of a model as the C++ kernels compute them all in one call.

Only where one rank has the whole layer: between ranks, sums come in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_runtime.kernels.layers import (
    AttentionWeights,
    FeedForwardWeights,
    LayersShape,
    LayerWeights,
    NativeLayers,
    Projection,
)
from penstock_runtime.model.operators import NativeLinear, NativeNorm
from penstock_runtime.model.rope import frequencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from penstock_runtime.attention.paged_native import PagedNativeAttention
    from penstock_runtime.kernels.native import Kernels
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.layers import AttentionBlock, DecoderLayer, FeedForwardBlock
    from penstock_runtime.model.linear import Linear
    from penstock_runtime.model.operators import Norm


def native_layers(
    kernels: Kernels,
    layers: Sequence[DecoderLayer],
    attention: PagedNativeAttention,
    config: ModelConfig,
    dtype: torch.dtype,
) -> NativeLayers:
    """Return layers that were made of `NativeOperators`, and their attention, as one."""
    shape = LayersShape(
        hidden=config.hidden_size,
        heads=config.heads,
        head_dim=config.head_dim,
        epsilon=config.norm_eps,
        frequencies=frequencies(config.rope, config.head_dim),
        magnitude=config.rope.attention_factor,
        dtype=dtype,
        round_inputs=attention.round_inputs,
    )
    return NativeLayers(kernels, [_weights(layer) for layer in layers], shape)


def _weights(layer: DecoderLayer) -> LayerWeights:
    return LayerWeights(
        None if layer.attention is None else _attention(layer.attention),
        None if layer.feed_forward is None else _feed_forward(layer.feed_forward),
    )


def _attention(block: AttentionBlock) -> AttentionWeights:
    attention = block.attention
    return AttentionWeights(
        norm=_norm(block.norm),
        qkv=_projection(attention.qkv),
        head_norm=None if attention.norm is None else attention.norm.weight_NH,
        output=_projection(attention.output),
    )


def _feed_forward(block: FeedForwardBlock) -> FeedForwardWeights:
    return FeedForwardWeights(
        norm=_norm(block.norm),
        gate_up=_projection(block.mlp.gate_up),
        down=_projection(block.mlp.down),
    )


def _norm(norm: Norm) -> torch.Tensor:
    assert isinstance(norm, NativeNorm)
    return norm.weight_D


def _projection(linear: Linear) -> Projection:
    assert isinstance(linear, NativeLinear)
    return linear.projection
