"""Which tensors a part of a model consists of, and building its layers from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from penstock_runtime.kvcache.base import attention_layers, feed_forward_layers
from penstock_runtime.model.collective import Alone
from penstock_runtime.model.layers import (
    AttentionBlock,
    DecoderLayer,
    Embedding,
    FeedForwardBlock,
    Head,
    Residual,
)
from penstock_runtime.model.shard import ADDED_ONCE, Shard

if TYPE_CHECKING:
    import torch

    from penstock_runtime.kvcache.base import LayerRange
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.operators import Operators
    from penstock_runtime.model.shard import Cut
    from penstock_runtime.model.weights import Checkpoint, Progress

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Tensor name to shape; a weight matrix is (outputs, inputs)."""

_ATTENTION = ("input_layernorm.", "self_attn.")
"""How the names of a layer's first half begin; all others are of its second."""
_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank of a stage holds of a model."""

    config: ModelConfig
    layers: LayerRange
    embed: bool
    head: bool
    collective: Collective = field(default_factory=Alone)

    @property
    def shard(self) -> Shard:
        """This rank's part of every layer."""
        return Shard(self.collective.rank, self.collective.size)

    @property
    def layer_indices(self) -> range:
        """The layers of which this part holds something."""
        return range(feed_forward_layers(self.layers)[0], attention_layers(self.layers)[1])

    def attention_names(self, index: int) -> list[str]:
        """Return the tensors of a layer's attention that this rank holds, or a part of them.

        Without the layer's prefix; none if this part does not hold the attention.
        """
        held = index in range(*attention_layers(self.layers))
        return [name for name in self._names() if held and name.startswith(_ATTENTION)]

    def feed_forward_names(self, index: int) -> list[str]:
        """Return the same of its feed-forward."""
        held = index in range(*feed_forward_layers(self.layers))
        return [name for name in self._names() if held and not name.startswith(_ATTENTION)]

    def _names(self) -> list[str]:
        names = layer_shapes(self.config)
        return [name for name in names if not self.collective.rank or name not in ADDED_ONCE]

    def shapes(self) -> Shapes:
        """Return the whole tensors that this part is read from, by their full names."""
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        shapes: Shapes = {}
        whole = layer_shapes(config)
        for index in self.layer_indices:
            names = self.attention_names(index) + self.feed_forward_names(index)
            shapes |= {_full(index, name): whole[name] for name in names}
        if self.embed:
            shapes[_EMBEDDING] = vocabulary
        if self.head:
            shapes[_FINAL_NORM] = (config.hidden_size,)
            shapes[_head_name(config)] = vocabulary
        return shapes


def layer_shapes(config: ModelConfig) -> Shapes:
    """Return the tensors of one layer, without the layer's prefix."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, outputs, inputs, bias in (
        ("self_attn.q_proj", q_rows, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_rows, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


class Loader:
    """Builds the layers of a part, reading one layer's tensors at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: Part,
        *,
        dtype: torch.dtype,
        device: torch.device,
        operators: Operators,
        progress: Progress,
    ) -> None:
        """Raises WeightsError naming the tensors that `checkpoint` lacks.

        Raises ModelConfigError if the model cannot be divided among so many ranks.
        """
        self._part = part
        self._config = part.shard.local(part.config)
        self._cuts = part.shard.layer_cuts(part.config) if part.collective.size > 1 else {}
        self._shapes = part.shapes()
        self._reader = checkpoint.read(self._shapes, progress)
        self._dtype = dtype
        self._device = device
        self._operators = operators
        self._residual = Residual(part.collective, dtype)
        self._tables: dict[str, torch.Tensor] = {}

    def layers(self) -> list[DecoderLayer]:
        """Return the layers, or what this part holds of them. Raises WeightsError."""
        return [self._layer(index) for index in self._part.layer_indices]

    def _layer(self, index: int) -> DecoderLayer:
        made = self._config, self._operators, self._residual
        attention = self._tensors(index, self._part.attention_names(index))
        feed_forward = self._tensors(index, self._part.feed_forward_names(index))
        return DecoderLayer(
            AttentionBlock(attention, *made) if attention else None,
            FeedForwardBlock(feed_forward, *made) if feed_forward else None,
        )

    def _tensors(self, index: int, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._take(_full(index, name), self._cuts.get(name)) for name in names}

    def embedding(self) -> Embedding:
        """Return the embedding. Raises WeightsError."""
        cut = self._vocabulary()
        return Embedding(self._vocabulary_rows(_EMBEDDING), cut.start, self._part.collective)

    def head(self) -> Head:
        """Return the final norm and the projection to logits. Raises WeightsError."""
        weight_VD = self._vocabulary_rows(_head_name(self._config))
        size = self._part.collective.size
        cuts = [Shard(rank, size).vocabulary(self._config) for rank in range(size)]
        return Head(
            self._take(_FINAL_NORM),
            weight_VD,
            self._config,
            self._operators,
            self._part.collective,
            [cut.stop - cut.start for cut in cuts],
        )

    def _vocabulary(self) -> Cut:
        return self._part.shard.vocabulary(self._config)

    def _vocabulary_rows(self, name: str) -> torch.Tensor:
        """Return this rank's rows of embedding or head, read once if they are one."""
        if name not in self._tables:
            self._tables[name] = self._take(name, self._vocabulary())
        return self._tables[name]

    def _take(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """Return a tensor of our own: the file may change or vanish once it is loaded."""
        mapped = self._reader.take(name, self._shapes[name], cut)
        return mapped.to(self._device, self._dtype, copy=True)


def _full(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


def _head_name(config: ModelConfig) -> str:
    return _EMBEDDING if config.tied_embeddings else _HEAD
