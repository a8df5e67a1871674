"""Host memory for what is large and read all the time: weights and KV.

Such memory is read faster in pages of 2 MiB: with the usual 4 KiB the processor looks an address up
every few dozen cache lines, and on a virtual machine each look-up reads two tables. Linux gives
large pages on request (`madvise`) where the machine's setting is `madvise` or `always`, as it
mostly is; a refusal changes nothing but speed.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_HUGE = 2 * 2**20
"""Bytes of a large page on x86-64, and on ARM with pages of 4 KiB."""


def large_empty(elements: int, dtype: torch.dtype, alignment: int = 64) -> torch.Tensor:
    """Return uninitialised host memory that starts on a border of `alignment` bytes.

    It asks for large pages, unless it is less than a few of them: there nothing is gained.
    """
    size = elements * dtype.itemsize
    large = size >= 4 * _HUGE
    border = _HUGE if large else alignment
    memory = torch.empty(elements + border // dtype.itemsize, dtype=dtype)
    offset = -memory.data_ptr() % border // dtype.itemsize
    used = memory[offset : offset + elements]
    if large:
        _advise_huge(used.data_ptr(), size)
    return used


def _advise_huge(address: int, size: int) -> None:
    """Ask for large pages. The answer does not matter: see above."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
