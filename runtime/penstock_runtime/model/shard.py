"""How a model is cut for tensor parallelism: which rows or columns each rank holds. Pure.

Projections that come first (q, k, v, gate, up) are cut by their outputs, those that come second
(o, down) by their inputs, so that two layers need one sum over the ranks (Shoeybi et al., arXiv
1909.08053). Embedding and head are cut by the vocabulary. Where there are more ranks than KV heads,
several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock_runtime.model.errors import ModelConfigError

if TYPE_CHECKING:
    from penstock_runtime.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Cut:
    """Part of a tensor: the half-open range [start, stop) of dimension `dim`."""

    dim: int
    start: int
    stop: int

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that is left of `shape`."""
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of every layer."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> tuple[int, int]:
        """Return this rank's half-open range of `count` things; ranges differ by one at most."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def kv_heads(self, config: ModelConfig) -> tuple[int, int]:
        """Return this rank's half-open range of the model's KV heads."""
        if config.kv_heads >= self.size:
            return self.share(config.kv_heads)
        head = self.rank * config.kv_heads // self.size
        return head, head + 1

    def local(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of this rank's layers: fewer heads, a narrower feed-forward.

        Raises ModelConfigError if the heads cannot be dealt out evenly.
        """
        heads, kv_heads = config.heads, config.kv_heads
        if heads % self.size:
            raise ModelConfigError(
                f"tensorParallel {self.size} does not divide this model's {heads} attention "
                "heads: use a divisor of them"
            )
        if kv_heads % self.size and self.size % kv_heads:
            raise ModelConfigError(
                f"tensorParallel {self.size} neither divides this model's {kv_heads} KV heads nor "
                "is a multiple of them: use one that does"
            )
        first, last = self.kv_heads(config)
        inner = self.share(config.intermediate_size)
        return replace(
            config,
            heads=heads // self.size,
            kv_heads=last - first,
            intermediate_size=inner[1] - inner[0],
        )

    def layer_cuts(self, config: ModelConfig) -> dict[str, Cut]:
        """Return the part of each of a layer's tensors that is not held whole.

        Args:
            config: of the whole model. Names are those in the checkpoint, without the prefix.
        """
        head_dim = config.head_dim
        queries = _scaled(self.share(config.heads), head_dim)
        keys = _scaled(self.kv_heads(config), head_dim)
        inner = self.share(config.intermediate_size)
        cuts: dict[str, Cut] = {}
        for name, rows in (
            ("self_attn.q_proj", queries),
            ("self_attn.k_proj", keys),
            ("self_attn.v_proj", keys),
            ("mlp.gate_proj", inner),
            ("mlp.up_proj", inner),
        ):
            cuts[f"{name}.weight"] = cuts[f"{name}.bias"] = Cut(0, *rows)
        cuts["self_attn.o_proj.weight"] = Cut(1, *queries)
        cuts["mlp.down_proj.weight"] = Cut(1, *inner)
        return cuts

    def vocabulary(self, config: ModelConfig) -> Cut:
        """Return this rank's rows of the embedding and of the head."""
        return Cut(0, *self.share(config.vocab_size))


ADDED_ONCE = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""Biases of layers whose outputs are summed over the ranks: only rank 0 holds them."""


def _scaled(bounds: tuple[int, int], factor: int) -> tuple[int, int]:
    return bounds[0] * factor, bounds[1] * factor
