"""The order of device work and transfers.

On CUDA a call returns when its kernels are queued, not when they have run, while a transfer reads
and writes device memory outside of any stream. So nothing may be handed to a transfer before the
kernels that write it have ended, and no memory given back before those that read it have.

    compute thread   kernels of a step → `wait`           then the event loop posts KV and tokens
    event loop       activations: `copy` to the ring slot → then WRITE
                     `copy` out of the ring slot          → then Credit

Copies have a stream of their own: on the kernels' stream they would end behind the next step's.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import torch


class Streams(Protocol):
    """The device work of one process."""

    def enter(self) -> None:
        """Make the device the calling thread's."""

    def wait(self) -> None:
        """Return when all that the calling thread has queued has run."""

    async def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy tensors of one shape; return when the bytes lie there.

        Kernels that wrote `source` must have ended.
        """

    async def clone(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy, as `copy` makes it."""
        ...


class HostStreams:
    """The CPU: what was called has happened."""

    def enter(self) -> None:
        """Nothing to do."""

    def wait(self) -> None:
        """Nothing to wait for."""

    async def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy at once."""
        # Arenas are made on the compute thread, where tensors are for inference only.
        with torch.inference_mode():
            target.copy_(source)

    async def clone(self, source: torch.Tensor) -> torch.Tensor:
        """Copy at once."""
        return source.clone()


class CudaStreams:
    """One CUDA device. Threads that wait sleep; they do not spin."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def enter(self) -> None:
        """See `Streams`."""
        torch.cuda.set_device(self._device)

    def wait(self) -> None:
        """See `Streams`."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()

    async def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Streams`."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event.record(self._copies)
        # Shielded: a caller that is cancelled must not let go of memory that is being read.
        await asyncio.shield(asyncio.ensure_future(_ended(event, target, source)))

    async def clone(self, source: torch.Tensor) -> torch.Tensor:
        """See `Streams`."""
        # Of the copies' own memory: what the kernels' stream lets go of it may still be using.
        with torch.cuda.stream(self._copies):
            target = torch.empty_like(source)
        await self.copy(target, source)
        return target


async def _ended(event: torch.cuda.Event, *held: torch.Tensor) -> None:
    """Return when the event has; the tensors are kept until then."""
    await asyncio.to_thread(event.synchronize)
    del held


def streams_of(device: torch.device) -> Streams:
    """Return the streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
