"""The memory of a KV pool: one tensor, one range of addresses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from penstock_runtime.memory import large_empty

if TYPE_CHECKING:
    from penstock_runtime.kvcache.base import KVLayout

ALIGNMENT = 4096
"""Bytes. Transfers register whole memory pages, and a page of KV starts on a cache line."""


class PoolTensor:
    """The pages of one worker's pool: (pages, layers, planes, K, S, H), contiguous.

    Host memory starts on a 4096-byte border and is written once here, so that it is resident before
    it is registered for transfers. Zeros matter beyond that: attention reads whole pages and masks
    what it does not mean, and a masked NaN would still spoil the sum.
    """

    def __init__(
        self,
        layout: KVLayout,
        pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: torch.Tensor | None = None,
    ) -> None:
        """Take memory, or use `memory`: bytes that start on an ALIGNMENT border, zeroed here.

        Raises ValueError if `dtype` does not fit `layout.itemsize`.
        """
        if dtype.itemsize != layout.itemsize:
            raise ValueError(f"{dtype} has {dtype.itemsize} bytes, the layout {layout.itemsize}")
        self.layout = layout
        self.pages = pages
        shape = layout.shape(pages)
        if memory is None:
            flat = _aligned_empty(math.prod(shape), dtype, device)
        else:
            flat = memory.view(dtype)[: math.prod(shape)]
        self.tensor = flat.view(shape).zero_()
        self.nbytes = pages * layout.page_bytes
        self._layers = [self.tensor[:, index] for index in range(layout.layers)]

    @property
    def address(self) -> int:
        """Address of page 0, in host or device memory; page p lies at address + p·page_bytes."""
        return self.tensor.data_ptr()

    def layer(self, index: int) -> torch.Tensor:
        """Return the view (pages, planes, K, S, H) of layer first_layer + index."""
        return self._layers[index]


def _aligned_empty(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `elements` uninitialised elements that start on an ALIGNMENT border."""
    if device.type == "cpu":
        return large_empty(elements, dtype, ALIGNMENT)
    spare = ALIGNMENT // dtype.itemsize
    memory = torch.empty(elements + spare, dtype=dtype, device=device)
    offset = -memory.data_ptr() % ALIGNMENT // dtype.itemsize
    return memory[offset : offset + elements]
