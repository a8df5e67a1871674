"""What a row of `engine_vs_vllm.py` costs at least, held against what the machine can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_worker import Options, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a model's forward multiplies and reads."""

    weights: int
    """Elements of all matrices but the embedding, the head among them."""
    head: int
    """Elements of the head: only the last token of a prompt meets it."""
    last: int
    """Elements of the last layer that only the last token must meet: all but k's and v's."""
    layers: int
    attention: int
    """Query heads times head dim, of one layer."""
    kv: int
    """Elements of keys and values a token, of all layers."""
    weight_bytes: float
    """Of all matrices in memory, as they are kept there."""
    kv_bytes: int
    """Of one element in memory."""

    @classmethod
    def of(cls, options: Options, matrix_bytes: float) -> Shape:
        """Read the config.json of a checkpoint that is shaped like Llama or Qwen.

        Args:
            options: the model, and how it is computed.
            matrix_bytes: what the kernels keep it in; 0: torch does, and widens it to float32.
        """
        config = json.loads((options.model / "config.json").read_text())
        hidden, layers, dim = (
            config[key] for key in ("hidden_size", "num_hidden_layers", "head_dim")
        )
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head = config["vocab_size"] * hidden
        layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        weights = layers * layer + head
        return cls(
            weights=weights,
            head=head,
            last=layer - hidden * dim * 2 * kv_heads,
            layers=layers,
            attention=heads * dim,
            kv=layers * 2 * kv_heads * dim,
            weight_bytes=matrix_bytes or 4 * weights,
            kv_bytes=4 if options.dtype == "float32" else 2,
        )

    def flops(self, tokens: int) -> float:
        """Return the operations that the token behind a prompt takes at least.

        Attention's causal half is counted, and of the last layer the last token alone, but for
        everybody's keys and values.
        """
        every = self.weights - self.head - self.last
        pairs = (self.layers - 1) * tokens * (tokens + 1) / 2 + tokens
        return 2 * every * tokens + 2 * (self.last + self.head) + 4 * pairs * self.attention

    def step_bytes(self, batch: int, context: float) -> float:
        """Return the bytes that a decode step reads."""
        return self.weight_bytes + self.kv_bytes * batch * context * self.kv


def limit_share(options: Options, task: Task, rate: float, limits: dict[str, float]) -> float:
    """Return which share of the machine's limit our rate, in tokens/s, is.

    A prefill is held against arithmetic, a decode against reading memory. Many sequences at once
    are limited by both, so their share of reading is lower.
    """
    row = task.row
    shape = Shape.of(options, limits["matrix_bytes"])
    if row.kind == "prefill":
        narrow = limits.get("bfloat16_gflops") if options.dtype == "bfloat16" else None
        gflops = narrow or limits["float32_gflops"]
        return rate * shape.flops(row.size) / row.size / (1e9 * gflops)
    read = shape.step_bytes(row.size, task.context + task.steps / 2)
    return rate / row.size * read / (1e9 * limits["read_gbytes"])
