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
    """Memory of this process that another one can open. Lives as long as the tensor."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Take `nbytes` bytes. Raises OSError or torch's error if there is not so much."""
        self.handle: SharedHandle
        self.descriptor: int | None = None
        """To be inherited, for host memory."""
        if device.type == "cuda":
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
            storage: Any = self.tensor.untyped_storage()
            self.handle = tuple(storage._share_cuda_())
            return
        self.handle = self.descriptor = os.memfd_create("penstock-kv")
        os.ftruncate(self.descriptor, nbytes)
        self.tensor = _mapped(self.descriptor, nbytes)

    def close_descriptor(self) -> None:
        """Give the descriptor back once it was inherited; the memory stays."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


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
