"""The models of `gpu.py`, random weights in known shapes, and what computing them costs at least.

Costs count what no implementation can do without: every weight and the KV of every sequence is read
once a decode step, every weight is multiplied once a prompt token. Activations are left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from common import CACHE, say
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ITEMSIZE = 2
"""bfloat16."""
_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 with untied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * heads * self.head_dim
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Elements of the projection to logits."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim
        return self.num_hidden_layers * per_layer * ITEMSIZE

    def decode_bytes(self, batch: int, context: float) -> float:
        """Return what one decode step must read, with `context` tokens a sequence."""
        weights = self.num_hidden_layers * self.layer_weights + self.head_weights
        return weights * ITEMSIZE + batch * context * self.kv_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Return the operations that the token behind a prompt takes: 2 a weight and token, and
        attention.

        Causal attention multiplies half of tokens² pairs twice (QKᵀ and PV), 2 operations each. Of
        the last layer, the keys and values of all tokens are computed, the rest and the projection
        to logits of one.
        """
        full = self.num_hidden_layers - 1
        keys_values = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        linear = 2 * (full * self.layer_weights + keys_values) * tokens
        width = self.num_attention_heads * self.head_dim
        attention = 2 * full * width * tokens**2
        return linear + attention + 2 * (self.layer_weights + self.head_weights)


SHAPES = {
    "1.7b": Shape(2048, 6144, 28, 16, 8, 128, 32768),
    "8b": Shape(4096, 12288, 36, 32, 8, 128, 32768),
}
"""Layers as of Qwen3-1.7B and 8B; a smaller vocabulary, so that layers are what is measured."""


def ensure_model(name: str) -> Path:
    """Return the directory of a model, written now unless it is there: 3 or 16 GB."""
    directory, shape = CACHE / f"qwen3-{name}", SHAPES[name]
    if (directory / "config.json").exists():
        return directory
    say(f"writing random weights to {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, tensors in enumerate(_files(shape)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    described = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(described)
    # Last, as the sign that all is there.
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    return directory


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        **asdict(shape),
    }


def _files(shape: Shape) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of one file: one layer, or what is outside of the layers."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    outside = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    yield _random(outside) | {"model.norm.weight": _ones(shape.hidden_size)}
    q_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    for number in range(shape.num_hidden_layers):
        layer = f"model.layers.{number}."
        matrices = {
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        norms = {
            "input_layernorm.weight": hidden,
            "post_attention_layernorm.weight": hidden,
            "self_attn.q_norm.weight": shape.head_dim,
            "self_attn.k_norm.weight": shape.head_dim,
        }
        tensors = _random({layer + key: size for key, size in matrices.items()})
        yield tensors | {layer + key: _ones(size) for key, size in norms.items()}


def _random(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {
        name: (torch.randn(size) * _DEVIATION).to(torch.bfloat16) for name, size in shapes.items()
    }


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)
