"""The compute thread: the one place where torch runs, so that the event loop never blocks.

What it returns has happened: on a device with streams the thread waits for its kernels. Transfers
may then read what they wrote, and the time it took is that of the work, not of queueing it.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

import torch

from penstock_runtime.engine.streams import HostStreams
from penstock_runtime.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.engine.streams import Streams

P = ParamSpec("P")
T = TypeVar("T")


def leave_cores_to_compute() -> None:
    """Give torch one thread on the calling thread, the event loop's, before there is a `Compute`.

    All it does with torch is to copy activations. By default it would do so with a team of its own,
    as large as the machine: the team is woken for each copy, waits for cores that compute has, and
    spins behind it.
    """
    # A thread takes over the number last set in the process when torch first asks, even if it was
    # told its own before. So let it ask now.
    torch.get_num_threads()
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What a function returned, and when the thread began and ended it, by `time.perf_counter`."""

    result: T
    begin: float
    end: float


class Work(Generic[T]):
    """A function that was given to the thread."""

    def __init__(self, future: Future[Timed[T]]) -> None:
        self._future = future

    @property
    def ended(self) -> bool:
        """Whether there is a result, or what the function raised."""
        return self._future.done()

    def result(self) -> Timed[T]:
        """Return what it returned, or raise what it raised. It has `ended`."""
        return self._future.result(timeout=0)

    def withdraw(self) -> bool:
        """Take it back, as if it had not been given. False: it has begun."""
        return self._future.cancel()


class Compute:
    """Runs functions one after another on a thread of its own, in inference mode.

    Args:
        threads: that torch uses on the CPU.
        streams: of the device; None: the CPU.

    `busy_seconds` is the time spent computing since the start, for the bubble metric.
    """

    def __init__(self, threads: int, streams: Streams | None = None) -> None:
        self.streams: Streams = streams or HostStreams()
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="compute",
            initializer=self._enter,
            initargs=(threads,),
        )
        self.busy_seconds = 0.0

    def _enter(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.streams.enter()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return function(*args), computed on the thread, its kernels included.

        If the caller is cancelled, a function that has begun still runs to its end; `settle` waits
        for it. Raises DeviceFailed, or what the function raises.
        """
        return (await self.timed(function, *args, **kwargs)).result

    async def timed(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Timed[T]:
        """Return function(*args) as `run` does, and when it was computed."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._timed(function, *args, **kwargs)
        )

    def give(self, function: Callable[[], T], ended: Callable[[], None]) -> Work[T]:
        """Have a function computed behind what was given before.

        `ended` is called when it was, on the event loop.
        """
        loop = asyncio.get_running_loop()
        future = self._executor.submit(self._timed, function)
        future.add_done_callback(
            lambda done: None if done.cancelled() else loop.call_soon_threadsafe(ended)
        )
        return Work(future)

    def _timed(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Timed[T]:
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                result = function(*args, **kwargs)
                self.streams.wait()
            return Timed(result, begin, time.perf_counter())
        except torch.AcceleratorError as error:
            # The process's context is lost with it: whatever comes next would fail with the same.
            raise DeviceFailed(f"the device failed: {error}") from error
        finally:
            self.busy_seconds += time.perf_counter() - begin

    async def settle(self) -> None:
        """Return when everything submitted so far has ended."""
        await asyncio.get_running_loop().run_in_executor(self._executor, _nothing)

    def close(self) -> None:
        """Let the running function end and stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    pass
