"""An arena of pages in this process's memory, as tests of transfers use it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from penstock_runtime.transfer.base import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from penstock_runtime.transfer.base import Ranges


def page_ranges(base: int, page_bytes: int, pages: Sequence[int]) -> Ranges:
    """Return the ranges of these pages of an arena at `base`."""
    starts = np.uint64(base) + np.asarray(pages, np.uint64) * np.uint64(page_bytes)
    return np.column_stack((starts, np.full(len(pages), page_bytes, np.uint64)))


class Arena:
    """`pages` pages of `page_bytes` bytes."""

    def __init__(self, pages: int, page_bytes: int, fill: int = 0) -> None:
        self.page_bytes = page_bytes
        self.memory: NDArray[np.uint8] = np.full((pages, page_bytes), fill, np.uint8)

    @property
    def base(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def region(self) -> Region:
        return Region(self.base, self.memory.nbytes)

    def ranges(self, pages: Sequence[int]) -> Ranges:
        return page_ranges(self.base, self.page_bytes, pages)

    def fill(self, value: int) -> None:
        self.memory[:] = value

    def randomize(self, seed: int) -> None:
        self.memory[:] = random_bytes(seed, self.memory.shape)

    def bytes(self) -> bytes:
        return self.memory.tobytes()

    def checksums(self, pages: Sequence[int] | None = None) -> list[int]:
        """Return a checksum of each page."""
        return checksums(self.memory, pages)


def random_bytes(seed: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def checksums(memory: NDArray[np.uint8], pages: Sequence[int] | None) -> list[int]:
    chosen = range(len(memory)) if pages is None else pages
    return [zlib.crc32(memory[page].data) for page in chosen]
