"""How many operations a prompt takes: what stages are divided by, and what benchmarks count.

Two a weight and token, and attention: causal, so a token meets those in front of it and itself, in
two products (QKᵀ and PV) of two operations an element. Of the last layer only the keys and values
of all tokens are wanted, see `layers.WantedRows`; norms, rotations and the embedding are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock_runtime.model.config import ModelConfig


def half_layer_flops(config: ModelConfig, tokens: int) -> list[float]:
    """Return what a prompt takes of every layer, its attention and then its feed-forward."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    keys_values = 2.0 * tokens * hidden * 2 * kv_heads
    queries_output = 2.0 * tokens * hidden * 2 * heads
    attention = 4.0 * heads * tokens * (tokens + 1) / 2
    feed_forward = 2.0 * tokens * 3 * hidden * inner
    whole = [keys_values + queries_output + attention, feed_forward]
    return whole * (config.layers - 1) + [keys_values, 0.0]
