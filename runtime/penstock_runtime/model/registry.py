"""What each supported Hugging Face architecture consists of.

An architecture is a description, not code: the decoder layer in `layers.py` reads it. A field that
is a string names the key of config.json that decides; a boolean decides by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

ConfigFlag: TypeAlias = bool | str
"""True or False for every checkpoint, or the boolean key of config.json that says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer: pre-norm, rotary positions, grouped-query attention, SwiGLU."""

    name: str
    """As in config.json's `architectures`."""
    qkv_bias: ConfigFlag = False
    output_bias: ConfigFlag = False
    """Bias of the attention output projection."""
    mlp_bias: ConfigFlag = False
    qk_norm: bool = False
    """RMS norm over each head of q and k before the rotation."""
    windowed: ConfigFlag = False
    """Whether the key `sliding_window` bounds how far attention looks back."""
    default_head_dim: int | None = None
    """Head dim where config.json has none; None: hidden_size / num_attention_heads."""


_ARCHITECTURES = (
    Architecture(
        name="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Architecture(name="MistralForCausalLM", windowed=True),
    Architecture(name="Qwen2ForCausalLM", qkv_bias=True, windowed="use_sliding_window"),
    Architecture(
        name="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        windowed="use_sliding_window",
        default_head_dim=128,
    ),
)

ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}
"""Every supported architecture by its Hugging Face name."""
