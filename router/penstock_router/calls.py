"""One Generate sent to one decode worker, and what comes back for it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from penstock_wire.messages import Cancel, Failed, Generate, Tokens
from penstock_wire.sockets import LinkDown

if TYPE_CHECKING:
    from penstock_router.links import WorkerLink


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, and the attempt with it."""

    reason: str


Answer: TypeAlias = Tokens | Failed | Lost


class Calls:
    """The open calls of one worker, by request id."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link
        self._open: dict[str, Call] = {}

    def __len__(self) -> int:
        """Return how many calls are open."""
        return len(self._open)

    def begin(self, generate: Generate) -> Call:
        """Send `generate` and return its call. Raises LinkDown if the worker is not there."""
        self._link.send(generate)
        call = Call(self, generate.request_id)
        self._open[generate.request_id] = call
        return call

    def deliver(self, answer: Tokens | Failed) -> None:
        """Hand an answer to its call; one for a call that is closed is dropped."""
        call = self._open.get(answer.request_id)
        if call is not None:
            call.put(answer)

    def lose(self, reason: str) -> None:
        """Tell all open calls that the worker is gone."""
        lost = Lost(reason)
        for call in list(self._open.values()):
            call.put(lost)

    def end(self, request_id: str, *, cancel: bool) -> None:
        """Forget a call; `cancel` tells the worker that nobody waits for it."""
        if self._open.pop(request_id, None) is not None and cancel:
            # A worker that is gone has nothing to cancel: it frees what its lost peers asked for.
            with contextlib.suppress(LinkDown):
                self._link.send(Cancel(request_id=request_id))


class Call:
    """An open call. Close it in every case: an unfinished one is cancelled at the worker."""

    def __init__(self, calls: Calls, request_id: str) -> None:
        self._calls = calls
        self._request_id = request_id
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._ended = False

    def put(self, answer: Answer) -> None:
        """Queue an answer for whoever waits."""
        if not isinstance(answer, Tokens) or answer.finish:
            self._ended = True
        self._answers.put_nowait(answer)

    async def get(self, timeout: float) -> Answer:  # noqa: ASYNC109 - a deadline on a queue
        """Return the next answer. Raises TimeoutError after `timeout` seconds of silence."""
        if not self._answers.empty():
            return self._answers.get_nowait()
        async with asyncio.timeout(timeout):
            return await self._answers.get()

    def close(self) -> None:
        """End the call; the worker is told unless it ended by itself."""
        self._calls.end(self._request_id, cancel=not self._ended)
