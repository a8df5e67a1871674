"""Tiny random checkpoints saved by transformers, and its logits for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.transformer import Transformer

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 199
MAX_TOKENS = 96
"""Longest prompt of the tests."""
INITIALIZER_RANGE = 0.2
"""Far from uniform attention, yet well conditioned: at 0.3 the layers amplify rounding so much that
transformers' own float32 logits are 9e-5 from its float64 ones."""


def whole_model(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    """Load all layers of a checkpoint, embedding and head, on the CPU."""
    config = ModelConfig.from_directory(path)
    return Transformer.load(
        path,
        config,
        layers=(0, config.layers),
        embed=True,
        head=True,
        dtype=dtype,
        device=torch.device("cpu"),
        **options,
    )


def shape(**changes: Any) -> dict[str, Any]:
    """Return the sizes of a tiny model."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": 2,
        "bos_token_id": 1,
    } | changes


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}

CONFIGS = {
    "llama": LlamaConfig(**shape()),
    "llama-mha": LlamaConfig(**shape(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-mqa": LlamaConfig(**shape(num_key_value_heads=1)),
    "llama-biased": LlamaConfig(**shape(attention_bias=True, mlp_bias=True)),
    "llama-llama3": LlamaConfig(**shape(rope_parameters=LLAMA3)),
    "llama-linear": LlamaConfig(**shape(rope_parameters=LINEAR)),
    "llama-dynamic": LlamaConfig(**shape(rope_parameters=DYNAMIC)),
    "mistral": MistralConfig(**shape(sliding_window=None, head_dim=20)),
    "mistral-window": MistralConfig(**shape(sliding_window=MAX_TOKENS)),
    "qwen2": Qwen2Config(**shape(tie_word_embeddings=True)),
    "qwen2-yarn": Qwen2Config(**shape(rope_parameters=YARN)),
    # Of whole panels: what is gated goes from one product to the next in words (linear.cpp).
    "qwen3": Qwen3Config(**shape(head_dim=16, tie_word_embeddings=True, intermediate_size=224)),
    "qwen3-yarn": Qwen3Config(
        **shape(head_dim=32, rope_parameters=YARN | {"truncate": False}, attention_bias=True)
    ),
}


PROMPTS = 3


@dataclass(frozen=True)
class Reference:
    """A checkpoint directory, and transformers' logits for some prompts."""

    path: Path
    tokens: torch.Tensor
    """(PROMPTS, MAX_TOKENS)"""
    logits: torch.Tensor
    """In float32, (PROMPTS, MAX_TOKENS, VOCAB)."""
    exact: torch.Tensor
    """The same in float64: what float32 logits are an approximation of."""


def save(config: Any, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save a random model of `config` and return it. Biases and norms are random too."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model = model.to(dtype).eval()
    model.save_pretrained(path, **options)
    return model


def reference(config: Any, path: Path) -> Reference:
    """Save a model and compute its logits for random prompts."""
    model = save(config, path)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (PROMPTS, MAX_TOKENS), generator=generator)
    with torch.inference_mode():
        logits = model(tokens).logits
        return Reference(path, tokens, logits, model.double()(tokens).logits)
