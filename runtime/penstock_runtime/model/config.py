"""The configuration of a model, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from penstock_runtime.kvcache.base import KVLayout, attention_layers
from penstock_runtime.model.errors import ModelConfigError
from penstock_runtime.model.fields import Fields
from penstock_runtime.model.registry import ARCHITECTURES, Architecture
from penstock_runtime.model.rope import RopeConfig, RopeKind, yarn_attention_factor

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_runtime.kvcache.base import LayerRange

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Supported element types by their names in config.json."""


_RopeReader: TypeAlias = Callable[[Fields, Fields, float], RopeConfig]
"""(config.json, its rope object, theta) to the rope's configuration."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `DTYPES` has `dtype`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Sizes are in elements, contexts in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    """The head's weight is the embedding's."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_context: int
    """Longest sequence, in tokens, for which this forward computes what the model means."""
    max_context_reason: str
    """The field of config.json that sets max_context."""
    dtype: torch.dtype
    """Of the checkpoint."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `directory`/config.json. Raises ModelConfigError."""
        return cls.from_fields(Fields.from_file(directory / "config.json"))

    @classmethod
    def from_fields(cls, fields: Fields) -> ModelConfig:
        """Read the fields of a config.json. Raises ModelConfigError."""
        architecture = _architecture(fields)
        _require_silu(fields)
        hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.error(
                "num_key_value_heads", f"is {kv_heads}: it must divide {heads} heads"
            )
        head_dim = fields.integer("head_dim", architecture.default_head_dim or hidden_size // heads)
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}: rotary positions need an even one")
        rope = _rope(fields)
        max_context, reason = _max_context(fields, architecture, rope)
        return cls(
            architecture=architecture.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            layers=fields.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope,
            tied_embeddings=fields.boolean("tie_word_embeddings", default=False),
            qkv_bias=_flag(fields, architecture.qkv_bias),
            output_bias=_flag(fields, architecture.output_bias),
            mlp_bias=_flag(fields, architecture.mlp_bias),
            qk_norm=architecture.qk_norm,
            max_context=max_context,
            max_context_reason=reason,
            dtype=_dtype(fields),
            eos_token_ids=fields.integers("eos_token_id"),
        )

    def require_context(self, tokens: int) -> None:
        """Raise ModelConfigError if sequences of `tokens` tokens are beyond the model."""
        if tokens > self.max_context:
            raise ModelConfigError(
                f"a context of {tokens} tokens is beyond this model: "
                f"{self.max_context_reason} allows {self.max_context}; ask for at most that"
            )

    def kv_layout(self, *, layers: LayerRange, page_size: int, dtype: torch.dtype) -> KVLayout:
        """Return how the KV of the layers [a, b) lies in pages of `page_size` tokens."""
        first, last = attention_layers(layers)
        return KVLayout(
            first_layer=first,
            last_layer=last,
            planes=2,
            kv_heads=self.kv_heads,
            page_size=page_size,
            head_dim=self.head_dim,
            itemsize=dtype.itemsize,
        )

    def kv_layout_digest(self, *, page_size: int, dtype: torch.dtype) -> str:
        """Return what two workers must agree on to exchange pages of this model."""
        layout = self.kv_layout(layers=(0, self.layers), page_size=page_size, dtype=dtype)
        return layout.digest(f"{self.architecture}/{self.layers}", dtype_name(dtype))


def _architecture(fields: Fields) -> Architecture:
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise fields.error("architectures", f"is {names!r}; supported are {supported}")
    return architecture


def _require_silu(fields: Fields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in {"silu", "swish"}:
        raise fields.error("hidden_act", f"is {activation!r}; only silu is supported")


def _flag(fields: Fields, flag: bool | str) -> bool:
    return flag if isinstance(flag, bool) else fields.boolean(flag, default=False)


def _dtype(fields: Fields) -> torch.dtype:
    name = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if name not in DTYPES:
        raise fields.error("dtype", f"is {name!r}; supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def _rope(fields: Fields) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.nested(key)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.error("partial_rotary_factor", "is set; only whole heads are rotated")
    kind = rope.text("rope_type", rope.text("type", "default"))
    reader = _ROPE_READERS.get(kind)
    if reader is None:
        supported = ", ".join(_ROPE_READERS)
        raise fields.error(f"{key}.rope_type", f"is {kind!r}; supported are {supported}")
    return reader(fields, rope, theta)


def _original_context(fields: Fields, rope: Fields) -> int:
    trained = rope.integer(
        "original_max_position_embeddings", fields.integer("max_position_embeddings", 2048)
    )
    return fields.integer("original_max_position_embeddings", trained)


def _plain(kind: RopeKind) -> _RopeReader:
    return lambda _fields, _rope, theta: RopeConfig(kind=kind, theta=theta)


def _linear(_fields: Fields, rope: Fields, theta: float) -> RopeConfig:
    return RopeConfig(kind="linear", theta=theta, factor=rope.number("factor"))


def _llama3(fields: Fields, rope: Fields, theta: float) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"is {high}: it must be above low_freq_factor, {low}")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=rope.number("factor"),
        original_context=_original_context(fields, rope),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Fields, rope: Fields, theta: float) -> RopeConfig:
    original = _original_context(fields, rope)
    factor = rope.number("factor", fields.integer("max_position_embeddings", original) / original)
    attention_factor = rope.optional_number("attention_factor") or yarn_attention_factor(
        factor, rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    )
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", default=True),
        attention_factor=attention_factor,
    )


_ROPE_READERS: dict[str, _RopeReader] = {
    "default": _plain("default"),
    "dynamic": _plain("dynamic"),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _max_context(fields: Fields, architecture: Architecture, rope: RopeConfig) -> tuple[int, str]:
    """Return the longest context and the field that sets it.

    A sliding window that a sequence never outgrows changes nothing, so windowed models are served
    up to their window.
    """
    context = fields.integer("max_position_embeddings", 2048)
    reason = "max_position_embeddings"
    if rope.kind == "yarn" and rope.factor * rope.original_context > context:
        context, reason = round(rope.factor * rope.original_context), "yarn's factor"
    if _has_window(fields, architecture) and fields.integer("sliding_window") < context:
        context = fields.integer("sliding_window")
        reason = "sliding_window (attention beyond the window is not implemented)"
    return context, reason


def _has_window(fields: Fields, architecture: Architecture) -> bool:
    if not _flag(fields, architecture.windowed) or fields.get("sliding_window") is None:
        return False
    # Qwen leaves the layers below max_window_layers unwindowed: often that is all of them.
    first = fields.integer("max_window_layers", 0, minimum=0)
    return first < fields.integer("num_hidden_layers")
