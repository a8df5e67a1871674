"""An arena of pages in the memory of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock_runtime.transfer.base import Region
from tests.integration.transfer.arena import Arena, checksums, random_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence


class DeviceArena(Arena):
    """`pages` pages of `page_bytes` bytes. What is written has been written on return."""

    def __init__(self, pages: int, page_bytes: int, fill: int = 0) -> None:
        self.page_bytes = page_bytes
        self._memory = torch.empty((pages, page_bytes), dtype=torch.uint8, device="cuda")
        self.fill(fill)

    @property
    def base(self) -> int:
        return self._memory.data_ptr()

    @property
    def region(self) -> Region:
        return Region(self.base, self._memory.numel(), self._memory.get_device())

    def fill(self, value: int) -> None:
        self._memory.fill_(value)
        torch.cuda.synchronize()

    def randomize(self, seed: int) -> None:
        self._memory.copy_(torch.from_numpy(random_bytes(seed, tuple(self._memory.shape))))
        torch.cuda.synchronize()

    def bytes(self) -> bytes:
        return self._memory.cpu().numpy().tobytes()

    def checksums(self, pages: Sequence[int] | None = None) -> list[int]:
        return checksums(self._memory.cpu().numpy(), pages)
