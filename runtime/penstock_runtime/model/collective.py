"""What the ranks of a tensor-parallel worker do together: sum, share, gather.

Shape letters: T tokens of the batch, D hidden size, R rows chosen for sampling, V vocabulary.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore  # what torch.distributed re-exports

if TYPE_CHECKING:
    from pathlib import Path


class Collective(Protocol):
    """The ranks of one worker. Every rank calls the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's x, the same on all; x may be overwritten."""
        ...

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return rank 0's x; the others give a tensor of its shape, which is overwritten."""
        ...

    def join_columns(self, x_RV: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Return on rank 0 the ranks' columns side by side, (R, sum of widths); elsewhere x."""
        ...

    def meet(self) -> None:
        """Return when every rank has come here; on a GPU, what is launched next waits for that."""
        ...


class Alone:
    """One rank."""

    rank = 0
    size = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x

    def join_columns(self, x_RV: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Return x."""
        assert widths == [x_RV.shape[1]]
        return x_RV

    def meet(self) -> None:
        """There is nobody to wait for."""


class Ranks:
    """Several ranks: gloo for host memory, NCCL for CUDA.

    A rank that ends while others wait for it is an error there, at once with gloo and after the
    timeout with NCCL: the worker ends then, and is started anew as a whole.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        meeting: Path,
        device: torch.device,
        address: str,
        timeout: float,
    ) -> None:
        """Make one that is not connected yet.

        Args:
            rank: this rank, from 0.
            size: number of ranks.
            meeting: a file that does not exist yet, where the ranks find each other. Whoever can
                write it can join, so it lies in a directory of the worker's own.
            device: where tensors are.
            address: gloo listens on this address; loopback for ranks on one machine.
            timeout: seconds to wait for each other, in every call.
        """
        self.rank, self.size = rank, size
        self._meeting = meeting
        self._device = device
        self._make = _nccl if device.type == "cuda" else _gloo
        self._address = address
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None

    def connect(self) -> None:
        """Wait until all ranks are there. Raises RuntimeError if they are not in time."""
        store = FileStore(str(self._meeting), self.size)
        store.set_timeout(self._timeout)
        self._group = self._make(store, self.rank, self.size, self._address, self._timeout)
        # The file may be removed when this returns, so nobody may still be reading it.
        self.meet()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's x, in place."""
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return rank 0's x, on the others in place. As bytes, so any dtype will do."""
        x = x.contiguous()
        self._group.broadcast(x.view(torch.uint8), 0).wait()
        return x

    def join_columns(self, x_RV: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Return on rank 0 the ranks' columns side by side, elsewhere x.

        A gather wants equal shapes: columns are padded to the widest rank's.
        """
        widest = max(widths)
        padded = torch.nn.functional.pad(x_RV, (0, widest - x_RV.shape[1])).contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        if self.rank:
            self._group.gather([], [padded], options).wait()
            return x_RV
        parts = [torch.empty_like(padded) for _ in widths]
        self._group.gather([parts], [padded], options).wait()
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def meet(self) -> None:
        """Wait for every rank: a sum needs something from each."""
        self.sum(torch.zeros(1, device=self._device))


# torch.distributed's own entry point keeps one world for the whole process. A group made directly
# belongs to its owner, so that several workers can live in one process, as tests have them. The
# classes are public and their stubs incomplete, hence Any.


def _gloo(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    group: Any = dist.ProcessGroupGloo
    options = group._Options()  # noqa: SLF001 - the name that torch itself calls it by
    options._timeout = timeout  # noqa: SLF001
    options._devices = [group.create_device(hostname=address)]  # noqa: SLF001
    return group(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, _address: str, timeout: timedelta) -> Any:
    group: Any = dist.ProcessGroupNCCL
    options = group.Options()
    options._timeout = timeout  # noqa: SLF001
    return group(store, rank, size, options)
