"""Which bytes of a page go where when two workers divide their KV heads differently. Pure.

A rank of a tensor-parallel worker has an arena of its own, with the KV heads [first, last) of
every layer it holds (`kvcache.base`). Where both sides hold the same heads, a stage's layers are
one range of a page. Where they do not, every (layer, plane) of a page is a range of its own,
because heads are outermost inside a plane.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from penstock_runtime.kvcache.base import KVLayout
    from penstock_runtime.transfer.base import Ranges, Region

Heads: TypeAlias = tuple[int, int]
"""Half-open range of the model's KV heads."""


@dataclass(frozen=True, slots=True)
class KvArena:
    """The KV pages of one rank of this process's worker, and the heads in them."""

    region: Region
    heads: Heads
    memory: object
    """Whose the memory is: it lives as long as this."""


@dataclass(frozen=True, slots=True)
class Side:
    """One worker's pages: where each rank's arena begins, its heads, and the layers held."""

    arenas: Sequence[tuple[int, Heads]]
    """(address, heads) of each rank."""
    layers: tuple[int, int]
    pages: Sequence[int]
    """Page numbers, the same in every arena; the i-th of one side belongs to the i-th of the
    other."""


def page_ranges(layout: KVLayout, layers: tuple[int, int], source: Side, target: Side) -> _Pair:
    """Return the memory ranges of `source` and of `target`, pairwise.

    Every head of every arena of `target` is written once; heads that several ranks of `source` hold
    are read from the first.

    Args:
        layout: planes, page size, head dim and item size, which both sides share.
        layers: to copy, [a, b), held by both sides.
        source: where the bytes are.
        target: where they go.

    Raises ValueError if a head that `target` wants is nowhere in `source`.
    """
    parts: list[tuple[Ranges, Ranges]] = []
    for address, heads in target.arenas:
        for from_address, from_heads, run in _runs(source.arenas, heads):
            spans = [
                _Span(replace(layout, kv_heads=held[1] - held[0]), side, base, held, run)
                for side, base, held in (
                    (source, from_address, from_heads),
                    (target, address, heads),
                )
            ]
            whole = all(run == held for held in (from_heads, heads))
            left, right = (span.ranges(layers, whole=whole) for span in spans)
            parts.append((left, right))
    return np.concatenate([left for left, _ in parts]), np.concatenate([r for _, r in parts])


_Pair: TypeAlias = "tuple[Ranges, Ranges]"


def _runs(arenas: Sequence[tuple[int, Heads]], wanted: Heads) -> Iterator[tuple[int, Heads, Heads]]:
    """Yield (address, heads, run): the arenas that hold the wanted heads, run by run."""
    head = wanted[0]
    while head < wanted[1]:
        for address, (first, last) in arenas:
            if first <= head < last:
                run = head, min(last, wanted[1])
                yield address, (first, last), run
                head = run[1]
                break
        else:
            raise ValueError(f"KV head {head} is in no arena of {[h for _, h in arenas]}")


@dataclass(frozen=True, slots=True)
class _Span:
    """A run of heads inside one arena's pages."""

    layout: KVLayout
    side: Side
    base: int
    held: Heads
    run: Heads

    def ranges(self, layers: tuple[int, int], *, whole: bool) -> Ranges:
        """Return the ranges in the order (page, layer, plane); one a page if `whole`."""
        layout, first = self.layout, self.side.layers[0]
        held_layers = self.side.layers[1] - first
        numbers = np.asarray(self.side.pages, np.uint64)
        pages = self.base + numbers * np.uint64(held_layers * layout.layer_bytes)
        if whole:
            starts = pages + np.uint64((layers[0] - first) * layout.layer_bytes)
            return _with_size(starts, (layers[1] - layers[0]) * layout.layer_bytes)
        head_bytes = layout.page_size * layout.head_dim * layout.itemsize
        plane_bytes = layout.kv_heads * head_bytes
        planes = np.arange(
            (layers[0] - first) * layout.planes,
            (layers[1] - first) * layout.planes,
            dtype=np.uint64,
        )
        offsets = planes * np.uint64(plane_bytes) + np.uint64(
            (self.run[0] - self.held[0]) * head_bytes
        )
        starts = (pages[:, None] + offsets[None]).reshape(-1)
        return _with_size(starts, (self.run[1] - self.run[0]) * head_bytes)


def _with_size(starts: Ranges, nbytes: int) -> Ranges:
    return np.stack([starts, np.full_like(starts, nbytes)], axis=1)
