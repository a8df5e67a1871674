"""A tiny model with heads that FlashInfer has kernels for, and running it on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.runner import positions_of
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PAGE, PAGES = 16, 64
VOCABULARY = 288


def save(path: Path, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> Path:
    """Write a random 4-layer Qwen3, float32, whose logits are spread well apart."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


class Loaded:
    """A model on a device with a pool."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        config = ModelConfig.from_directory(path)
        layers = (0, config.layers)
        self.model = Transformer.load(
            path, config, layers=layers, embed=True, head=True, dtype=dtype, device=device
        )
        layout = config.kv_layout(layers=layers, page_size=PAGE, dtype=dtype)
        self.pool = PoolTensor(layout, PAGES, dtype=dtype, device=device)

    @torch.inference_mode()
    def step(self, parts: Sequence[tuple[torch.Tensor, int, Sequence[int]]]) -> torch.Tensor:
        """Compute parts of (tokens, start, pages) as one batch; return float32 logits, on host."""
        model = self.model
        segments = [
            Segment(start=start, length=len(tokens), pages=pages) for tokens, start, pages in parts
        ]
        tokens = torch.cat([tokens for tokens, _, _ in parts]).to(model.device)
        hidden = model.forward(
            model.embed(tokens),
            positions_of(segments, model.device),
            model.attention.plan(segments, PAGE, model.device),
            self.pool.tensor,
        )
        return model.logits(hidden).cpu()
