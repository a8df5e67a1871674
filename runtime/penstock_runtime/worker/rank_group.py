"""All ranks of one worker: their memory, their processes, how they meet."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock_runtime.kvcache.shared_memory import SharedMemory
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.collective import Alone, Ranks
from penstock_runtime.model.config import dtype_name
from penstock_runtime.model.shard import Shard
from penstock_runtime.transfer.base import Region
from penstock_runtime.transfer.page_ranges import KvArena
from penstock_runtime.worker.other_ranks import NoOtherRanks, RankProcesses
from penstock_runtime.worker.rank import RankSetup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.compute import Compute
    from penstock_runtime.kvcache.base import KVLayout
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.config import ModelConfig
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
        pages: of every rank's pool.
        layout: of one rank's pages.
        places: one a rank; none: all beside the worker. Elsewhere is for measurements: the worker
            moves the KV of all its ranks, so they share its memory.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        config: ModelConfig,
        *,
        layers: tuple[int, int],
        dtype: torch.dtype,
        pages: int,
        layout: KVLayout,
        places: Sequence[Place] = (),
    ) -> None:
        self._settings = settings
        self._layers = layers
        self._dtype = dtype
        self._pages = pages
        self._layout = layout
        self._size = settings.tensor_parallel
        self._places = places or [Place()] * self._size
        self._shards = [Shard(rank, self._size) for rank in range(self._size)]
        self._heads = [shard.kv_heads(config) for shard in self._shards]
        self._folder = ""
        self._memory: list[SharedMemory] = []
        self.collective: Collective = Alone()
        self.others: OtherRanks = NoOtherRanks()
        self.arenas: list[KvArena] = []
        """One a rank, once there is a pool."""
        self._processes: RankProcesses | None = None

    async def start(self, path: Path) -> None:
        """Take every rank's KV memory and start the other ranks' processes. Raises OSError."""
        if self._size == 1:
            return
        self._folder = tempfile.mkdtemp(prefix="penstock-ranks-")
        nbytes = self._pages * self._layout.page_bytes
        self._memory = [SharedMemory(nbytes, self._device(shard.rank)) for shard in self._shards]
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
            [self._setup(shard.rank, path) for shard in self._shards[1:]],
            inherit=[descriptor for descriptor in descriptors if descriptor is not None],
            commands=[place.command for place in self._places[1:]],
        )
        await self._processes.start()
        for memory in self._memory:
            memory.close_descriptor()

    def pool(self) -> PoolTensor:
        """Return rank 0's pool; `arenas` is complete then."""
        device = self._device(0)
        memory = self._memory[0].tensor if self._memory else None
        pool = PoolTensor(
            self._layout, self._pages, dtype=self._dtype, device=device, memory=memory
        )
        parts = [memory.tensor for memory in self._memory] or [pool.tensor]
        self.arenas = [
            KvArena(
                Region(part.data_ptr(), pool.nbytes, part.get_device() if part.is_cuda else None),
                heads,
                part,
            )
            for part, heads in zip(parts, self._heads, strict=True)
        ]
        return pool

    async def connect(self, compute: Compute) -> None:
        """Return when every rank has loaded and has met the others.

        Raises RankLost if one ends before, RuntimeError if they do not meet.
        """
        if self._processes is None:
            return
        try:
            await self._processes.loaded()
            assert isinstance(self.collective, Ranks)
            await compute.run(self.collective.connect)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _meeting(self) -> Path:
        return Path(self._folder) / "meeting"

    def _device(self, rank: int) -> torch.device:
        kind = self._settings.device
        return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)

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
            page_size=settings.page_size,
            pages=self._pages,
            kv=self._memory[rank].handle,
        )
