"""Memory that a worker's ranks share.

Rank 0 takes it, registers it for transfers and moves its bytes; each rank computes in its own part.
So one process, one agent and one ledger of who may write what serve any number of ranks. Host
memory is an anonymous file, inherited by its descriptor: it has no name, and it is gone when the
last process that maps it is. Device memory travels as a CUDA IPC handle.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, TypeAlias

import torch

SharedHandle: TypeAlias = int | tuple[Any, ...]
"""How another process opens the memory: a file descriptor, or torch's CUDA IPC handle."""


class SharedMemory:
    """Memory of this process that another one can open: made empty, sized later.

    Another process inherits `descriptor` when it is started, before the size is known, and opens
    the memory by its handle afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.descriptor = os.memfd_create("penstock-kv") if device.type == "cpu" else None
        """None for device memory, which needs none."""

    def take(self, nbytes: int) -> tuple[torch.Tensor, SharedHandle]:
        """Take `nbytes` bytes; they live as long as the tensor. To be called once.

        Raises OSError or torch's error if there is not so much.
        """
        if self.descriptor is None:
            tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            storage: Any = tensor.untyped_storage()
            return tensor, tuple(storage._share_cuda_())
        handle, self.descriptor = self.descriptor, None
        try:
            os.ftruncate(handle, nbytes)
            return _mapped(handle, nbytes), handle
        finally:
            os.close(handle)


def open_shared(handle: SharedHandle, nbytes: int) -> torch.Tensor:
    """Return another process's memory as bytes. Raises OSError."""
    if isinstance(handle, int):
        tensor = _mapped(handle, nbytes)
        os.close(handle)
        return tensor
    storage: Any = torch.UntypedStorage
    shared = storage._new_shared_cuda(*handle)  # noqa: SLF001 - as torch.multiprocessing does
    return torch.empty(0, dtype=torch.uint8, device=shared.device).set_(shared)[:nbytes]


def _mapped(descriptor: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)
