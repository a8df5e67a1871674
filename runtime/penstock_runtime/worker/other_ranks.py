"""A worker's other ranks, as child processes. Their death is the worker's.

Rank 0 is the worker itself: control server, scheduler, transfers, sampling. The others are told
each step over a pipe and meet rank 0 in the sums of every layer (`model.collective`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Protocol

from penstock_runtime.engine.rank_step import NoFollowers
from penstock_runtime.errors import RankLost
from penstock_runtime.worker.rank import frame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.rank_step import RankStep
    from penstock_runtime.worker.rank import RankPool, RankSetup

log = logging.getLogger(__name__)

_END_SECONDS = 10.0
"""For a rank to end after its pipe was closed: its last step, and Python's own end."""


class OtherRanks(Protocol):
    """The ranks of a worker other than this process."""

    def tell(self, step: RankStep) -> None:
        """Have them compute their part of a step. Called on the compute thread."""
        ...

    async def watch(self) -> None:
        """Raise RankLost when one ends before `close`."""
        ...

    async def close(self) -> None:
        """End them; return when they are gone."""
        ...


class NoOtherRanks(NoFollowers):
    """There is one rank."""

    async def watch(self) -> None:
        """Nothing can end."""

    async def close(self) -> None:
        """Nothing is to be ended."""


class RankProcesses:
    """Child processes, each a rank.

    Args:
        setups: one a rank, in any order.
        inherit: file descriptors that the ranks need.
        commands: how each is started.
    """

    def __init__(
        self,
        setups: Sequence[RankSetup],
        inherit: Sequence[int],
        commands: Sequence[Sequence[str]],
    ) -> None:
        self._setups = setups
        self._inherit = tuple(inherit)
        self._commands = commands
        self._processes: list[asyncio.subprocess.Process] = []
        self._pipes: list[int] = []
        self._closing = False

    async def start(self) -> None:
        """Start the processes; they load on their own. Raises OSError."""
        for setup, command in zip(self._setups, self._commands, strict=True):
            theirs, ours = os.pipe()
            self._pipes.append(ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=theirs,
                    stdout=asyncio.subprocess.PIPE,
                    pass_fds=self._inherit,
                )
            finally:
                os.close(theirs)
            self._processes.append(process)
            await asyncio.to_thread(_write, ours, frame(setup))

    async def loaded(self) -> None:
        """Return when all have their weights. Raises RankLost if one ends instead.

        No deadline: how long weights take is not known here, and an end is noticed.
        """
        for process, setup in zip(self._processes, self._setups, strict=True):
            assert process.stdout is not None
            if await process.stdout.readline() != b"loaded\n":
                await process.wait()
                raise _lost(process, setup)

    def give(self, pools: Sequence[RankPool]) -> None:
        """Tell each rank its pool. Raises RankLost."""
        for pipe, pool in zip(self._pipes, pools, strict=True):
            _send(pipe, frame(pool))

    def tell(self, step: RankStep) -> None:
        """Send a step. Raises RankLost."""
        encoded = frame(step)
        for pipe in self._pipes:
            _send(pipe, encoded)

    async def watch(self) -> None:
        """Raise RankLost when one ends before `close`."""
        ends = {
            asyncio.create_task(process.wait()): (process, setup)
            for process, setup in zip(self._processes, self._setups, strict=True)
        }
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        if not self._closing:
            raise _lost(*ends[done.pop()])

    async def close(self) -> None:
        """Close the pipes, which ends the ranks; kill those that do not end.

        Logs how those ended that failed: a step that fails may be noticed before its rank's end.
        """
        self._closing = True
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes.clear()
        try:
            async with asyncio.timeout(_END_SECONDS):
                for process in self._processes:
                    await process.wait()
        except TimeoutError:
            log.warning("ranks did not end in %s s and are killed", _END_SECONDS)
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for process, setup in zip(self._processes, self._setups, strict=True):
            if process.returncode:
                log.error("%s", _lost(process, setup))


def _send(pipe: int, data: bytes) -> None:
    try:
        _write(pipe, data)
    except BrokenPipeError:
        raise RankLost("a rank of this worker has ended: see its last log lines") from None


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _lost(process: asyncio.subprocess.Process, setup: RankSetup) -> RankLost:
    code = process.returncode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    return RankLost(
        f"rank {setup.rank} of {setup.size} ended with {how}: its last log lines say why; the "
        "worker ends, too, and is started anew"
    )
