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
    itemsize: int
    """Bytes of one element in its dtype, as KV has it and the model."""

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
            itemsize=4 if options.dtype == "float32" else 2,
        )

    def flops(self, tokens: int) -> float:
        """Return the operations that the token behind a prompt takes at least.

        Attention's causal half is counted, and of the last layer the last token alone, but for
        everybody's keys and values.
        """
        every = self.weights - self.head - self.last
        pairs = (self.layers - 1) * tokens * (tokens + 1) / 2 + tokens
        return 2 * every * tokens + 2 * (self.last + self.head) + 4 * pairs * self.attention

    def step_bytes(self, batch: int, context: float, weight_bytes: float) -> float:
        """Return the bytes that a decode step reads if matrices take `weight_bytes`."""
        return weight_bytes + self.itemsize * batch * context * self.kv


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What our rate is of the most that this machine could have had."""

    share: float
    """Of arithmetic for a prefill; of reading memory for a decode, by the bytes that are read."""
    model_share: float | None
    """Of reading for a decode, as model bandwidth utilisation is mostly given: by the bytes that
    the model has in its dtype, however they lie in memory. None for a prefill."""


def limit_shares(
    options: Options, task: Task, rate: float, limits: dict[str, float], given: float
) -> Shares:
    """Hold our rate, in tokens/s, against the machine's limits.

    A prefill is held against arithmetic, a decode against reading memory. Many sequences at once
    are limited by both, so their share of reading is lower.

    Args:
        options: the model, and how it was computed.
        task: what was measured.
        rate: tokens/s.
        limits: `Engine.limits`, measured while the host let all cores run.
        given: the share of the cores' time in which it did so during the sample.
    """
    row = task.row
    shape = Shape.of(options, limits["matrix_bytes"])
    if row.kind == "prefill":
        narrow = limits.get("bfloat16_gflops") if options.dtype == "bfloat16" else None
        gflops = given * (narrow or limits["float32_gflops"])
        return Shares(
            share=rate * shape.flops(row.size) / row.size / (1e9 * gflops), model_share=None
        )
    context = task.context + task.steps / 2

    def share(weight_bytes: float) -> float:
        read = rate / row.size * shape.step_bytes(row.size, context, weight_bytes)
        return read / (1e9 * given * limits["read_gbytes"])

    return Shares(
        share=share(shape.weight_bytes), model_share=share(shape.itemsize * shape.weights)
    )
