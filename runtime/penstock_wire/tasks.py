"""Background tasks: kept alive while they run, heard when they fail, ended together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine


def start(coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    """Start a task whose failure reaches the loop's exception handler at once.

    The caller keeps the task: the event loop alone would let it be collected while it runs.
    """
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(_report)
    return task


class Tasks:
    """The tasks of one owner. A task's failure reaches the loop's exception handler at once."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Start a task and keep it until it has ended."""
        task = start(coroutine, name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def settle(self) -> None:
        """Return when the tasks that run now have ended."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def cancel(self) -> None:
        """End the tasks that run now."""
        for task in self._running:
            task.cancel()
        await self.settle()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler(
            {"message": f"{task.get_name()} failed", "exception": error, "task": task}
        )
