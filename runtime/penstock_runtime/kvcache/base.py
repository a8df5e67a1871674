"""The KV layout: how a page lies in memory. Pure arithmetic, shared by pool, attention, transfer.

Grouped-query attention:    pool[pages, layers, 2, kv_heads, page_size, head_dim]   (2: K, V)
Latent attention (MLA):     pool[pages, layers, 1, 1, page_size, kv_lora_rank + rope_dim]

Page-first, so that a page is one contiguous range. A stage that holds layers [a, b) has pages of
(b - a) layers, and inside a decode worker's page (all layers) those layers are one contiguous range
too: one transfer descriptor a page.

A border between stages may lie within a layer, behind its attention: at 8.5 the attention of layer
8, and so its KV, is in front of the border, and its feed-forward behind.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TypeAlias

LayerRange: TypeAlias = tuple[float, float]
"""The half-open range [a, b) of layers, in multiples of 0.5; see above."""


def attention_layers(layers: LayerRange) -> tuple[int, int]:
    """Return the layers of a range whose attention, and so whose KV, lies in it."""
    return math.ceil(layers[0]), math.ceil(layers[1])


def feed_forward_layers(layers: LayerRange) -> tuple[int, int]:
    """Return the layers of a range whose feed-forward lies in it."""
    return math.floor(layers[0]), math.floor(layers[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The shape of one page for the layers [first_layer, last_layer)."""

    first_layer: int
    last_layer: int
    planes: int
    """2 for K and V, 1 for a latent."""
    kv_heads: int
    page_size: int
    """Tokens a page."""
    head_dim: int
    """Elements a token, plane and head."""
    itemsize: int
    """Bytes an element."""

    @property
    def layers(self) -> int:
        """Layers held."""
        return self.last_layer - self.first_layer

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer inside a page."""
        return self.planes * self.kv_heads * self.page_size * self.head_dim * self.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this layout's layers."""
        return self.layers * self.layer_bytes

    def shape(self, pages: int) -> tuple[int, int, int, int, int, int]:
        """Return the pool's shape for `pages` pages."""
        return (pages, self.layers, self.planes, self.kv_heads, self.page_size, self.head_dim)

    def digest(self, architecture: str, dtype: str) -> str:
        """Return what two workers must agree on to exchange pages; layers held are left out."""
        text = (
            f"{architecture} {dtype} {self.planes} {self.kv_heads} {self.page_size} {self.head_dim}"
        )
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def pages_for(tokens: int, page_size: int) -> int:
    """Return how many pages hold `tokens` tokens."""
    return -(-tokens // page_size)
