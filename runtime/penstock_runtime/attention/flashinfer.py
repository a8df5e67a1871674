"""Attention on CUDA: FlashInfer's kernels, which read and write our pages in place.

A layer's view of the pool, (pages, 2, K, S, H), is FlashInfer's layout "HND". It is not contiguous:
between two pages lie the other layers. Its kernels take the strides of a page, head and token from
the tensor (`paged_kv_t` in its page.cuh), in elements and 32 bits; K and V must have the same, and
the last dimension must be dense. All of that holds for the view, so nothing is copied.

The rows of a batch are the decode rows that come first, which the scheduler sees to, and the rest,
chunks or not. Each part has its wrapper, planned once a batch, and so have the rows that are wanted
of the last layer.

Plans are made in buffers of the wrappers: a plan is valid until the next one, and the device must
have finished with a batch before the next is planned, since tables are copied to it from pinned
memory that is used again. `engine.compute` sees to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import AttentionBackend
from penstock_runtime.attention.page_table import PageTable, leading_decodes, token_places
from penstock_runtime.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import AttentionShape, Segment
    from penstock_runtime.flashinfer_library import DecodeWrapper, FlashInfer, PrefillWrapper

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}
"""The oldest devices with tensor cores for the dtype."""
_LAYOUT = "HND"
_WORKSPACE_BYTES = 256 * 2**20
"""For the partial results of sequences that are divided. FlashInfer recommends 128 MiB and refuses
a batch that needs more; models with many heads do."""
_TENSOR_CORE_GROUP = 4
"""From so many query heads a KV head on, decode is faster on tensor cores (FlashInfer's own
advice); the kernel without them exists for groups of 1, 2 and 3."""


@dataclass(frozen=True, slots=True)
class Appends:
    """Where the batch's own keys and values go. All int32, on the device."""

    sequences: torch.Tensor
    """(T,)"""
    positions: torch.Tensor
    """(T,)"""
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], table: PageTable, device: torch.device) -> Appends:
        """Return the places of the segments' tokens; `table` is theirs."""
        sequences, positions = token_places(segments)
        return cls(
            sequences.to(device),
            positions.to(device),
            table.indptr.to(device),
            table.indices.to(device),
            table.last_page_len.to(device),
        )


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """A batch: where to write, and the wrappers, planned, that its rows go to."""

    appends: Appends | None
    """None for rows that are planned for `attend` alone."""
    decode_rows: int
    """Rows [0, decode_rows) are one token each."""
    decode: DecodeWrapper | None
    prefill: PrefillWrapper | None


class FlashInferAttention(AttentionBackend[FlashInferPlan]):
    """FlashInfer's paged attention for models of one shape on one device."""

    def __init__(self, library: FlashInfer, shape: AttentionShape, device: torch.device) -> None:
        self._library = library
        self._shape = shape
        self._device = device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode, self._wanted = (
            library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, _LAYOUT, use_tensor_cores=self._tensor_cores, backend="fa2"
            )
            for _ in range(2)
        )
        self._prefill = library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, _LAYOUT)

    @property
    def _tensor_cores(self) -> bool:
        return self._shape.heads // self._shape.kv_heads >= _TENSOR_CORE_GROUP

    def plan(
        self, segments: Sequence[Segment], page_size: int, device: torch.device
    ) -> FlashInferPlan:
        """Build the page table and plan the wrappers that the batch needs."""
        table = PageTable.of(segments, page_size)
        decodes = leading_decodes(segments)
        if decodes:
            plan_decode(self._decode, table.part(0, decodes), page_size, self._shape)
        if decodes < len(segments):
            self._plan_prefill(segments[decodes:], table.part(decodes, len(segments)), page_size)
        return FlashInferPlan(
            Appends.of(segments, table, device),
            decodes,
            self._decode if decodes else None,
            self._prefill if decodes < len(segments) else None,
        )

    def plan_rows(
        self,
        segments: Sequence[Segment],
        page_size: int,
        device: torch.device,  # noqa: ARG002 - the interface
    ) -> FlashInferPlan:
        """Plan them in a wrapper of their own: the batch's are in use."""
        plan_decode(self._wanted, PageTable.of(segments, page_size), page_size, self._shape)
        return FlashInferPlan(None, len(segments), self._wanted, None)

    def _plan_prefill(self, chunks: Sequence[Segment], table: PageTable, page_size: int) -> None:
        shape = self._shape
        lengths = torch.tensor([0, *(chunk.length for chunk in chunks)], dtype=torch.int32)
        self._prefill.plan(
            lengths.cumsum(0, dtype=torch.int32),
            table.indptr,
            table.indices,
            table.last_page_len,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            page_size,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=shape.scale,
        )

    def write(
        self, plan: FlashInferPlan, k_TKH: torch.Tensor, v_TKH: torch.Tensor, kv_layer: torch.Tensor
    ) -> None:
        """See the interface."""
        to = plan.appends
        assert to is not None, "planned for `attend` alone"
        self._library.append_paged_kv_cache(
            k_TKH,
            v_TKH,
            to.sequences,
            to.positions,
            kv_layer,
            to.indices,
            to.indptr,
            to.last_page_len,
            kv_layout=_LAYOUT,
        )

    def attend(
        self, plan: FlashInferPlan, q_TNH: torch.Tensor, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Decode rows, then chunks. Raises ValueError for another scale."""
        if not math.isclose(scale, self._shape.scale, rel_tol=1e-6):
            raise ValueError(f"planned for a scale of {self._shape.scale}, not {scale}")
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        rows = plan.decode_rows
        if plan.decode is not None:
            plan.decode.run(q_TNH[:rows], kv_layer, out=out_TNH[:rows])
        if plan.prefill is not None:
            plan.prefill.run(q_TNH[rows:], kv_layer, out=out_TNH[rows:])
        return out_TNH

    def fixed_decodes(self, sizes: Sequence[int], max_pages: int) -> dict[int, FixedDecode]:
        """Return plans whose tensors never move, one a batch size, for CUDA graphs.

        They share buffers: one is in use at a time. `max_pages`: of one sequence.
        """
        buffers = _Buffers(max(sizes), max_pages, self._device)
        return {size: self._fixed_decode(size, buffers) for size in sizes}

    def _fixed_decode(self, size: int, buffers: _Buffers) -> FixedDecode:
        appends = buffers.appends(size)
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=appends.indptr,
            paged_kv_indices_buffer=appends.indices,
            paged_kv_last_page_len_buffer=appends.last_page_len,
            backend="fa2",
        )
        return FixedDecode(FlashInferPlan(appends, size, wrapper, None), self._shape)


class FixedDecode:
    """A plan for decode batches of one size: its tensors keep their addresses."""

    def __init__(self, plan: FlashInferPlan, shape: AttentionShape) -> None:
        self.plan = plan
        self._shape = shape

    @property
    def positions(self) -> torch.Tensor:
        """The rows' positions, int32 on the device."""
        assert self.plan.appends is not None
        return self.plan.appends.positions

    def set(self, segments: Sequence[Segment], page_size: int) -> None:
        """Make the plan that of these segments, as many as it has rows, of one token each."""
        assert self.plan.decode is not None
        # The wrapper copies the table into the buffers that `appends` has too.
        plan_decode(self.plan.decode, PageTable.of(segments, page_size), page_size, self._shape)
        self.positions.copy_(token_places(segments)[1])


class _Buffers:
    """The device memory that plans for CUDA graphs share."""

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        def zeros(elements: int) -> torch.Tensor:
            return torch.zeros(elements, dtype=torch.int32, device=device)

        self._sequences = torch.arange(rows, dtype=torch.int32, device=device)
        self._positions = zeros(rows)
        self._indptr = zeros(rows + 1)
        self._indices = zeros(rows * max_pages)
        self._last_page_len = zeros(rows)

    def appends(self, rows: int) -> Appends:
        """Return the first rows' part of the buffers."""
        return Appends(
            self._sequences[:rows],
            self._positions[:rows],
            self._indptr[: rows + 1],
            self._indices,
            self._last_page_len[:rows],
        )


def plan_decode(
    wrapper: DecodeWrapper, table: PageTable, page_size: int, shape: AttentionShape
) -> None:
    """Plan a decode wrapper for the sequences of `table`."""
    wrapper.plan(
        table.indptr,
        table.indices,
        table.last_page_len,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        page_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=shape.scale,
    )


def check_supported(shape: AttentionShape, capability: tuple[int, int]) -> None:
    """Raise ConfigurationError, with the remedy, if FlashInfer has no kernel for a model.

    `capability`: of the device, (major, minor).
    """
    needed = _CAPABILITY[shape.dtype]
    if capability < needed:
        remedy = "--dtype float16 or " if capability >= _CAPABILITY[torch.float16] else ""
        raise ConfigurationError(
            f"{shape.dtype} attention needs a GPU of compute capability {_dotted(needed)} or "
            f"later, this one has {_dotted(capability)}: use {remedy}--dtype float32"
        )
    if shape.head_dim not in HEAD_DIMS:
        raise ConfigurationError(
            f"FlashInfer has no kernel for heads of {shape.head_dim} elements, only of "
            f"{', '.join(map(str, HEAD_DIMS))}: use --dtype float32, which does without it"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
