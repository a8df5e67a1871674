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


def large_empty(elements: int, dtype: torch.dtype, alignment: int = 64) -> torch.Tensor:
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
