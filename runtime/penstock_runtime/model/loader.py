"""Which tensors a part of a model consists of, and building its layers from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from penstock_runtime.model.layers import DecoderLayer, Head

if TYPE_CHECKING:
    import torch

    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.operators import Operators
    from penstock_runtime.model.weights import Checkpoint, Progress

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Tensor name to shape; a weight matrix is (outputs, inputs)."""

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one stage holds of a model."""

    config: ModelConfig
    layers: tuple[int, int]
    """The half-open range [a, b)."""
    embed: bool
    head: bool

    def shapes(self) -> Shapes:
        """Return the tensors of this part, by their full names."""
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        shapes: Shapes = {}
        for index in range(*self.layers):
            shapes |= {_full(index, name): shape for name, shape in layer_shapes(config).items()}
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
        """Raises WeightsError naming the tensors that `checkpoint` lacks."""
        self._config = part.config
        self._shapes = part.shapes()
        self._reader = checkpoint.read(self._shapes, progress)
        self._dtype = dtype
        self._device = device
        self._operators = operators
        self._table: torch.Tensor | None = None

    def layer(self, index: int) -> DecoderLayer:
        """Return the layer `index` of the model. Raises WeightsError."""
        tensors = {name: self._take(_full(index, name)) for name in layer_shapes(self._config)}
        return DecoderLayer(tensors, self._config, self._operators)

    def embedding(self) -> torch.Tensor:
        """Return the embeddings, (V, D). Raises WeightsError."""
        if self._table is None:
            self._table = self._take(_EMBEDDING)
        return self._table

    def head(self) -> Head:
        """Return the final norm and the projection to logits. Raises WeightsError."""
        tied = self._config.tied_embeddings
        weight = self.embedding() if tied else self._take(_HEAD)
        return Head(self._take(_FINAL_NORM), weight, self._config, self._operators)

    def _take(self, name: str) -> torch.Tensor:
        """Return a tensor of our own: the file may change or vanish once it is loaded."""
        mapped = self._reader.take(name, self._shapes[name])
        return mapped.to(self._device, self._dtype, copy=True)


def _full(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


def _head_name(config: ModelConfig) -> str:
    return _EMBEDDING if config.tied_embeddings else _HEAD
