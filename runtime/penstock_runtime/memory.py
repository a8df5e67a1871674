"""Memory of the host for what is large and read all the time, weights and KV; and its lack.

Such memory is read faster in pages of 2 MiB: with the usual 4 KiB the processor looks an address up
every few dozen cache lines, and on a virtual machine each look-up reads two tables. Linux gives
large pages on request (`madvise`) where the machine's setting is `madvise` or `always`, as it
mostly is; a refusal changes nothing but speed. It gives them when memory is first touched, so it is
mapped anew: what an allocator hands out again is in small pages already.
"""

from __future__ import annotations

import errno
import mmap
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from penstock_runtime.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUGE = 2 * 2**20
"""Bytes of a large page on x86-64, and on ARM with pages of 4 KiB."""
_LINE = 64
"""Bytes of a cache line."""


def large_empty(elements: int, dtype: torch.dtype, alignment: int = _LINE) -> torch.Tensor:
    """Return host memory of undefined content that starts on a border of `alignment` bytes.

    It is in large pages if it fills one, where the machine gives them.
    """
    size = elements * dtype.itemsize
    if size < _HUGE:
        memory = torch.empty(elements + alignment // dtype.itemsize, dtype=dtype)
        return _from_border(memory, alignment, elements)
    # Private: the usual shared mapping would be a file's, in small pages.
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=dtype)
    used = _from_border(memory, _HUGE, elements)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        # Whole pages only: the rest of the last one would be memory that nothing is in.
        with suppress(OSError):  # refused, as by a kernel that has no large pages
            mapping.madvise(advice, used.data_ptr() - memory.data_ptr(), size // _HUGE * _HUGE)
    return used


class Arena:
    """Memory for pieces that live as long as each other, such as the weights of a model.

    They lie one behind the other, so that all of them are in large pages: a piece by itself would
    have its end, up to 2 MiB, in small ones.
    """

    def __init__(self, size: int = 64 * 2**20) -> None:
        """Ask the system for so many bytes at a time, or for as many as one piece takes."""
        self._size = size
        self._free = torch.empty(0, dtype=torch.uint8)
        self._last = self._free

    def take(self, size: int) -> torch.Tensor:
        """Return bytes of undefined content, uint8 (size,), that start on a cache line's border."""
        if size > len(self._free):
            self._free = large_empty(max(size, self._size), torch.uint8)
        self._last = self._free
        return self.trim(size)

    def trim(self, size: int) -> torch.Tensor:
        """Take back the end of the piece that was taken last, and return its first `size` bytes."""
        self._free = self._last[-(-size // _LINE) * _LINE :]
        return self._last[:size]


@contextmanager
def out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory into a ConfigurationError that says for what, and a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"{what}: the GPU has not enough memory; {remedy}. {reason}"
        ) from error
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise ConfigurationError(f"{what}: this machine has not enough memory; {remedy}") from error


def _from_border(memory: torch.Tensor, border: int, elements: int) -> torch.Tensor:
    offset = -memory.data_ptr() % border // memory.itemsize
    return memory[offset : offset + elements]
