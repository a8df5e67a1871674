"""All ranks of one worker: their memory, their processes, how they meet."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock_runtime.cuda_device import free_bytes
from penstock_runtime.kvcache.shared_memory import SharedMemory
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.memory import out_of_memory
from penstock_runtime.model.collective import Alone, Ranks
from penstock_runtime.model.config import dtype_name
from penstock_runtime.model.shard import Shard
from penstock_runtime.transfer.base import Region
from penstock_runtime.transfer.page_ranges import KvArena
from penstock_runtime.worker.other_ranks import NoOtherRanks, RankProcesses
from penstock_runtime.worker.prepare import count_pages
from penstock_runtime.worker.rank import RankPool, RankSetup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.kvcache.base import KVLayout, LayerRange
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.transformer import Transformer
    from penstock_runtime.worker.other_ranks import OtherRanks
    from penstock_runtime.worker.settings import WorkerSettings

_TIMEOUT_SECONDS = 60.0
"""For ranks to wait for each other within a step: they run the same layers side by side, so more
than a hiccup means that one hangs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    address: str = "127.0.0.1"
    """The ranks reach each other at these."""
    command: tuple[str, ...] = (sys.executable, "-m", "penstock_runtime.worker.rank")
    """Starts it, as a child of the worker. Not used for rank 0."""


class RankGroup:
    """Rank 0's view of the ranks, this one among them.

    Args:
        settings: of the worker.
        config: of the whole model.
        layers: that the worker holds.
        dtype: of KV and activations.
        layout: of one rank's pages.
        places: one a rank; none: all beside the worker. Elsewhere is for measurements: the worker
            moves the KV of all its ranks, so they share its memory.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        config: ModelConfig,
        *,
        layers: LayerRange,
        dtype: torch.dtype,
        layout: KVLayout,
        places: Sequence[Place] = (),
    ) -> None:
        self._settings = settings
        self._layers = layers
        self._dtype = dtype
        self._layout = layout
        self._size = settings.tensor_parallel
        self._places = places or [Place()] * self._size
        self._heads = [Shard(rank, self._size).kv_heads(config) for rank in range(self._size)]
        self._folder = Path()
        self._memory: list[SharedMemory] = []
        self._told: list[RankPool] = []
        self.collective: Collective = Alone()
        self.others: OtherRanks = NoOtherRanks()
        self.arenas: list[KvArena] = []
        """One a rank, once there is a pool."""
        self._processes: RankProcesses | None = None

    async def start(self, path: Path) -> None:
        """Start the other ranks' processes; they load their part of the weights. Raises OSError."""
        if self._size == 1:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-ranks-"))
        self._memory = [SharedMemory(self._device(rank)) for rank in range(self._size)]
        self.collective = Ranks(
            rank=0,
            size=self._size,
            meeting=self._meeting,
            device=self._device(0),
            address=self._places[0].address,
            timeout=_TIMEOUT_SECONDS,
        )
        descriptors = [memory.descriptor for memory in self._memory]
        self.others = self._processes = RankProcesses(
            [self._setup(rank, path) for rank in range(1, self._size)],
            inherit=[descriptor for descriptor in descriptors if descriptor is not None],
            commands=[place.command for place in self._places[1:]],
        )
        await self._processes.start()

    async def loaded(self) -> None:
        """Return when the others have their weights. Raises RankLost if one ends before."""
        if self._processes is not None:
            await self._processes.loaded()

    def take_pool(self, model: Transformer) -> PoolTensor:
        """Take every rank's KV memory; return this rank's pool, and have `arenas` complete.

        Raises ConfigurationError if the memory is too small for two pages, or there is not so much.
        """
        memory = self._settings.kv_memory
        pages = count_pages(memory, self._free_bytes, self._layout.page_bytes * self._size)
        with out_of_memory(f"--kv-memory {memory}", "lower it (kvCache.memory in the manifest)"):
            taken = [shared.take(pages * self._layout.page_bytes) for shared in self._memory]
            pool = PoolTensor(
                self._layout,
                pages,
                dtype=self._dtype,
                device=model.device,
                memory=taken[0][0] if taken else None,
            )
        self._told = [RankPool(pages=pages, kv=handle) for _, handle in taken[1:]]
        parts = [tensor for tensor, _ in taken] or [pool.tensor]
        self.arenas = [
            KvArena(Region(part.data_ptr(), pool.nbytes, _index(part)), heads, part)
            for part, heads in zip(parts, self._heads, strict=True)
        ]
        return pool

    async def connect(self, compute: Compute) -> None:
        """Return when every rank has its pool and has met the others.

        Raises RankLost if one ends before, RuntimeError if they do not meet.
        """
        if self._processes is None:
            return
        try:
            await asyncio.to_thread(self._processes.give, self._told)
            assert isinstance(self.collective, Ranks)
            await compute.run(self.collective.connect)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _meeting(self) -> Path:
        return self._folder / "meeting"

    def _device(self, rank: int) -> torch.device:
        kind = self._settings.device
        return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)

    def _free_bytes(self) -> int:
        """Return what the ranks' devices leave: as much of each as of the fullest."""
        return self._size * min(free_bytes(self._device(rank)) for rank in range(self._size))

    def _setup(self, rank: int, path: Path) -> RankSetup:
        settings = self._settings
        return RankSetup(
            rank=rank,
            size=self._size,
            meeting=str(self._meeting),
            address=self._places[rank].address,
            timeout=_TIMEOUT_SECONDS,
            threads=max(1, settings.threads // self._size),
            model=str(path),
            layers=self._layers,
            embed=settings.stage == 0,
            head=settings.role == "decode",
            dtype=dtype_name(self._dtype),
            device=str(self._device(rank)),
            kernels=settings.kernels,
            page_size=settings.page_size,
        )


def _index(tensor: torch.Tensor) -> int | None:
    return tensor.get_device() if tensor.is_cuda else None
