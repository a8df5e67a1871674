"""Attention on the CPU without a compiler: gather pages, flash attention, merge by logsumexp.

torch has no kernel that walks pages, so pages are copied next to each other first, a bounded number
of tokens at a time: what was copied is then still in the processor's cache when it is read, and the
copy goes into memory that is used again. The pool of a layer is read as a matrix with one row a
(page, K or V, head): copying rows is memcpy, while `index_select` on the 5-dimensional view copies
the whole pool first (a thousand times slower, measured).

A prefill chunk is the triangle of its own tokens (causal) and the rectangle before it (no mask, the
query heads of a group folded into rows), merged exactly by their logsumexps: a causal flag alone is
aligned to the top left, and a mask is slow.

Decode rows of similar length share a call. A row is padded to a length that follows from its own
alone, so its bits do not depend on the rows beside it.

The flash kernel is an operator private to torch, called nowhere else.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import AttentionBackend
from penstock_runtime.attention.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment

_BLOCK_TOKENS = 4096
"""Tokens of a long sequence copied at a time. With 8 KV heads of 128 bfloat16: 16 MiB."""
_GROUP_TOKENS = 1024
"""Tokens of short sequences copied at a time: their one read should still find them in cache."""


@dataclass(slots=True)
class Timings:
    """Seconds spent, since it was set, in all of attention and in copying pages."""

    attention: float = 0.0
    gather: float = 0.0


@dataclass(slots=True)
class Gather:
    """Pages to copy next to each other: those of B sequences, P each."""

    pages: torch.Tensor
    """(B, P)"""
    rows: torch.Tensor | None = None
    """Rows of the pool's matrix, (2 · B · K · P,): known once a pool was seen."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill chunk: the batch rows [first, last), of which `own` has the keys."""

    first: int
    last: int
    own: Gather
    own_start: int
    """Where the chunk's first token lies in what `own` copies."""
    prefix: list[tuple[Gather, int]]
    """What lies before the chunk, in blocks: pages, and tokens in them."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of similar length, B of them."""

    rows: torch.Tensor
    """Their rows in the batch, (B,)."""
    gather: Gather
    mask: torch.Tensor
    """(B, 1, 1, keys): 0 for a row's own keys, -inf for padding."""


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A batch, by what is done with its rows."""

    slots: Slots
    chunks: list[Chunk]
    groups: list[DecodeGroup]


@dataclass(slots=True)
class _Scratch:
    """Memory for gathered pages, used again by every gather."""

    buffers: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor, valid until the next take of this dtype."""
        elements = math.prod(shape)
        buffer = self.buffers.get(dtype)
        if buffer is None or buffer.numel() < elements:
            buffer = self.buffers[dtype] = torch.empty(elements, dtype=dtype)
        return buffer[:elements].view(shape)


class PagedCpuAttention(AttentionBackend[CpuPlan]):
    """Attention over pages on the CPU. The plan belongs to one pool.

    Arithmetic is in the dtype of q, which may be wider than that of the pages. Set `timings` to
    measure; that costs two clock reads a gather.
    """

    def __init__(
        self, block_tokens: int = _BLOCK_TOKENS, group_tokens: int = _GROUP_TOKENS
    ) -> None:
        self.timings: Timings | None = None
        self._block_tokens = block_tokens
        self._group_tokens = group_tokens
        self._scratch = _Scratch()

    def plan(self, segments: Sequence[Segment], page_size: int, device: torch.device) -> CpuPlan:
        """Sort the batch's rows into chunks and groups of decode rows.

        A decode row with a long sequence is planned as a chunk of one token: its pages are then
        copied in blocks, so that the scratch memory has a bound.
        """
        chunks: list[Chunk] = []
        decodes: list[tuple[int, Segment]] = []
        row = 0
        for segment in segments:
            if segment.length == 1 and segment.start < self._block_tokens:
                decodes.append((row, segment))
            else:
                max_pages = max(1, self._block_tokens // page_size)
                chunks.append(_plan_chunk(row, segment, page_size, max_pages))
            row += segment.length
        pages = [segment.start // page_size + 1 for _, segment in decodes]
        by_size = group_by_size(pages, self._group_tokens // page_size)
        groups = [
            _plan_group([decodes[index] for index in members], size, page_size)
            for size, size_groups in by_size.items()
            for members in size_groups
        ]
        return CpuPlan(Slots.of(segments, page_size, device), chunks, groups)

    def write(
        self, plan: CpuPlan, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """See the interface."""
        started = time.perf_counter() if self.timings else 0.0
        plan.slots.write(kv_layer, k_TKH, v_TKH)
        if self.timings:
            self.timings.attention += time.perf_counter() - started

    def attend(
        self, plan: CpuPlan, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Chunks one by one, decode rows in groups."""
        started = time.perf_counter() if self.timings else 0.0
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.last)
            self._run_chunk(chunk, q_TNH[rows], kv_layer, scale, out_TNH[rows])
        for group in plan.groups:
            self._run_group(group, q_TNH, kv_layer, scale, out_TNH)
        if self.timings:
            self.timings.attention += time.perf_counter() - started
        return out_TNH

    def _run_chunk(
        self,
        chunk: Chunk,
        q_MNH: torch.Tensor,
        kv_layer: torch.Tensor,
        scale: float,
        out_MNH: torch.Tensor,
    ) -> None:
        kv_heads = kv_layer.shape[2]
        queries, _, head_dim = q_MNH.shape
        q_GKMH = q_MNH.view(queries, kv_heads, -1, head_dim).permute(2, 1, 0, 3)
        group = q_GKMH.shape[0]
        kv = self._gather(chunk.own, kv_layer, q_MNH.dtype)
        kv = kv.narrow(3, chunk.own_start, queries).expand(2, group, -1, -1, -1)
        own, own_lse = _flash(q_GKMH, kv[0], kv[1], scale, causal=True)
        out_KGMH, lse_KGM = own.transpose(0, 1), own_lse.transpose(0, 1)
        if chunk.prefix:
            folded = q_GKMH.transpose(0, 1).reshape(1, kv_heads, group * queries, head_dim)
        for gather, tokens in chunk.prefix:
            kv = self._gather(gather, kv_layer, q_MNH.dtype)[:, :, :, :tokens]
            part, part_lse = _flash(folded, kv[0], kv[1], scale)
            part_KGMH = part.view(out_KGMH.shape)
            out_KGMH, lse_KGM = merge(out_KGMH, lse_KGM, part_KGMH, part_lse.view(lse_KGM.shape))
        out_MNH.view(queries, kv_heads, group, head_dim).copy_(out_KGMH.permute(2, 0, 1, 3))

    def _run_group(
        self,
        group: DecodeGroup,
        q_TNH: torch.Tensor,
        kv_layer: torch.Tensor,
        scale: float,
        out_TNH: torch.Tensor,
    ) -> None:
        kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
        q_BNH = q_TNH[group.rows]
        q_BKGH = q_BNH.view(len(q_BNH), kv_heads, -1, head_dim)
        kv = self._gather(group.gather, kv_layer, q_TNH.dtype)
        mask = group.mask.to(q_TNH.dtype)
        out_BKGH, _ = _flash(q_BKGH, kv[0], kv[1], scale, mask=mask)
        out_TNH[group.rows] = out_BKGH.reshape(q_BNH.shape)

    def _gather(self, gather: Gather, kv_layer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return keys and values (2, B, K, P·S, H), valid until the next gather."""
        started = time.perf_counter() if self.timings else 0.0
        kv_heads, page_size, head_dim = kv_layer.shape[2:]
        if gather.rows is None:
            gather.rows = _matrix_rows(gather.pages, kv_layer)
        matrix = _as_matrix(kv_layer)
        gathered = self._scratch.take((len(gather.rows), page_size * head_dim), kv_layer.dtype)
        torch.index_select(matrix, 0, gather.rows, out=gathered)
        if dtype != kv_layer.dtype:
            gathered = self._scratch.take(gathered.shape, dtype).copy_(gathered)
        sequences, pages = gather.pages.shape
        if self.timings:
            self.timings.gather += time.perf_counter() - started
        return gathered.view(2, sequences, kv_heads, pages * page_size, head_dim)


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both.

    With l the logsumexp of the scores, the weight of the second is e^l₂ / (e^l₁ + e^l₂), the
    logistic function of l₂ - l₁ (Milakov and Gimelshein, arXiv 1805.02867).

    out, other: (..., H). lse, other_lse: float32 (...). Returns both merged.
    """
    weight = torch.sigmoid(other_lse - lse)[..., None]
    merged = torch.lerp(out.float(), other.float(), weight).to(out.dtype)
    return merged, torch.logaddexp(lse, other_lse)


def padded_pages(pages: int) -> int:
    """Return to how many pages a sequence of `pages` is padded: an eighth more at the most.

    With p in [2^k, 2^(k+1)), p is rounded up to a multiple of 2^(k-3), so few lengths remain.
    """
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step


def group_by_size(pages: Sequence[int], max_pages: int) -> dict[int, list[list[int]]]:
    """Return the indices of `pages` in groups, by the pages that their members are padded to.

    A group has at most `max_pages` pages in all, or one member. Every index is in one group.
    """
    by_size: dict[int, list[int]] = {}
    for index, count in enumerate(pages):
        by_size.setdefault(padded_pages(count), []).append(index)
    groups = {}
    for size, members in by_size.items():
        count = max(1, max_pages // size)
        groups[size] = [members[at : at + count] for at in range(0, len(members), count)]
    return groups


def _plan_chunk(row: int, segment: Segment, page_size: int, max_pages: int) -> Chunk:
    pages = torch.tensor(list(segment.pages), dtype=torch.int64)
    first_own = segment.start // page_size
    last_own = -(-(segment.start + segment.length) // page_size)
    prefix_pages = -(-segment.start // page_size)
    prefix = []
    for first in range(0, prefix_pages, max_pages):
        last = min(first + max_pages, prefix_pages)
        tokens = min(last * page_size, segment.start) - first * page_size
        prefix.append((Gather(pages[None, first:last]), tokens))
    return Chunk(
        first=row,
        last=row + segment.length,
        own=Gather(pages[None, first_own:last_own]),
        own_start=segment.start - first_own * page_size,
        prefix=prefix,
    )


def _plan_group(members: list[tuple[int, Segment]], size: int, page_size: int) -> DecodeGroup:
    lengths = torch.tensor([segment.start + 1 for _, segment in members])
    # Padding repeats a page of the sequence itself: finite values, masked.
    table = [
        [*pages, *[pages[0]] * (size - len(pages))]
        for pages in (
            list(segment.pages)[: segment.start // page_size + 1] for _, segment in members
        )
    ]
    padding = torch.arange(size * page_size) >= lengths[:, None]
    mask = torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)
    return DecodeGroup(
        rows=torch.tensor([row for row, _ in members]),
        gather=Gather(torch.tensor(table, dtype=torch.int64)),
        mask=mask[:, None, None],
    )


def _as_matrix(kv_layer: torch.Tensor) -> torch.Tensor:
    """Return the pool from this layer on as rows of S·H elements: one a (page, plane, head)."""
    pages, planes, kv_heads, page_size, head_dim = kv_layer.shape
    row = page_size * head_dim
    rows = (pages - 1) * (kv_layer.stride(0) // row) + planes * kv_heads
    return kv_layer.as_strided((rows, row), (row, 1))


def _matrix_rows(pages_BP: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
    """Return the rows of the pages in the order (plane, sequence, head, page)."""
    _, planes, kv_heads, page_size, head_dim = kv_layer.shape
    page_rows = kv_layer.stride(0) // (page_size * head_dim)
    head_rows = torch.arange(planes * kv_heads).view(planes, 1, kv_heads, 1)
    return (head_rows + pages_BP[None, :, None, :] * page_rows).reshape(-1)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention (B, N, M, H) and the float32 logsumexp of the scores (B, N, M)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse
