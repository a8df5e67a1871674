"""The transfer interface over NIXL: one thread a process calls NIXL, the event loop calls it.

    event loop  ── commands (queue) ──►  NIXL thread: run commands, poll every agent, wait
                ◄── results, notifications (call_soon_threadsafe) ──

NIXL's own progress thread stays off: it burns a core. Over TCP the thread waits for the agents'
sockets (`sockets.py`), and asks by itself the more rarely the longer nothing has happened; where
they cannot be watched it naps between polls, briefly while something moves, longer while nothing
does.

What a caller must know beyond `transfer.base`:

- Cancelling a coroutine that waits here is like a timeout: the operation stays in flight.
- Ending an agent (`fence`) takes some 20 to 100 ms, during which this process's other agents wait.
- Names of agents are unique for ever: they hold a boot_id and an incarnation. Memory that a peer
  was told of may be written by it until the fence, whatever NIXL is told in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from penstock_runtime.transfer.base import (
    Agent,
    AgentClosed,
    OnNotify,
    PeerLost,
    Region,
    Transfer,
    TransferError,
)
from penstock_runtime.transfer.metadata import check_pairs, devices_of
from penstock_runtime.transfer.nixl_endpoint import Endpoint, NixlLibrary, Operation
from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.transfer.sockets import Sockets

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.transfer.base import Ranges
    from penstock_runtime.transfer.stats import AgentStats

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_CLOSE_SECONDS = 30.0
"""Longest wait for the thread to end: every agent takes at most some 100 ms."""


class NixlThread:
    """The thread that owns every NIXL agent of the process, and the way to it."""

    def __init__(self, settings: NixlSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._endpoints: dict[Endpoint, Callable[[list[bytes]], None]] = {}
        self._waiting: set[asyncio.Future[Any]] = set()
        """Futures not yet set; touched by the event loop only."""
        self._heard: Callable[[], None] | None = None
        """A command that ended a nap; the thread's."""
        self._sockets = Sockets()
        self._woken = False
        """Whether sockets ended the last wait."""
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="nixl", daemon=True)
        self._thread.start()

    # --- called from the event loop -----------------------------------------------------------

    async def call(self, function: Callable[[], _T]) -> _T:
        """Run a function on the thread and return its result or raise its exception."""
        future: asyncio.Future[_T] = self.future()

        def command() -> None:
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - it is raised in the caller
                self.post(partial(_fail, future, error))
            else:
                self.post(partial(_succeed, future, result))

        self.submit(command)
        return await future

    def submit(self, command: Callable[[], None]) -> None:
        """Run a command that raises nothing on the thread, without waiting for it."""
        self._commands.put(command)
        self._sockets.ring()

    def future(self) -> asyncio.Future[Any]:
        """Return a future that fails if the thread ends. Raises AgentClosed if it has."""
        if self._failure is not None or self._stopping:
            raise self._ended()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    async def close(self) -> None:
        """End every agent, then the thread. Raises TransferError if either is not possible."""
        if self._failure is None:
            await self.call(self._destroy_all)
        self._stopping = True
        self.submit(_nothing)
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TransferError(f"the NIXL thread did not end within {_CLOSE_SECONDS:g} s")
        self._sockets.close()

    # --- called on the thread -----------------------------------------------------------------

    def add(self, endpoint: Endpoint, deliver: Callable[[list[bytes]], None]) -> None:
        """Poll this endpoint from now on; `deliver` is called on the event loop."""
        self._endpoints[endpoint] = deliver
        for event_set in endpoint.event_sets:
            self._sockets.watch(event_set)

    def destroy(self, endpoint: Endpoint) -> None:
        """End an endpoint, at once and for good. A second call does nothing."""
        if self._endpoints.pop(endpoint, None) is not None:
            for event_set in endpoint.event_sets:
                self._sockets.forget(event_set)
            endpoint.destroy()

    def post(self, callback: Callable[[], None]) -> None:
        """Call back on the event loop, or stop if the loop is gone."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self._stopping = True

    def _main(self) -> None:
        try:
            self._run()
        except Exception as error:
            logger.exception("the NIXL thread failed")
            self._failure = error
        finally:
            # Agents are left only after a failure, or if the event loop went away.
            try:
                self._destroy_all()
            finally:
                self.post(self._fail_all)

    def _run(self) -> None:
        active_at = time.monotonic()
        # Looked at before every wait: the command that comes with the stop may have been run.
        while not self._stopping and not self._loop.is_closed():
            busy = any(endpoint.busy for endpoint in self._endpoints)
            self._wait(busy=busy, quiet=time.monotonic() - active_at)
            if self._woken | self._run_commands() | self._poll() | busy:
                active_at = time.monotonic()

    def _wait(self, *, busy: bool, quiet: float) -> None:
        """Return when there may be something to do; nothing has happened for `quiet` seconds."""
        settings = self._settings
        linger = settings.linger_seconds
        if not self._endpoints:
            self._nap(None)
        elif not all(endpoint.event_sets for endpoint in self._endpoints):
            soon = busy or quiet < linger
            self._nap(settings.nap_in_flight_seconds if soon else settings.nap_idle_seconds)
        elif not (self._woken and self._nap(settings.spacing_seconds)):
            seconds = settings.nap_idle_seconds if busy else max(linger, quiet)
            self._woken = self._sockets.wait(min(seconds, settings.nap_watched_seconds))

    def _nap(self, seconds: float | None) -> bool:
        """Return after some seconds, or at once with a command; tell whether there is one."""
        try:
            self._heard = self._commands.get(timeout=seconds)
        except queue.Empty:
            return False
        return True

    def _run_commands(self) -> bool:
        """Run all commands there are. Tell whether there was one."""
        command, self._heard = self._heard, None
        ran = False
        with contextlib.suppress(queue.Empty):
            while True:
                if command is not None:
                    ran = True
                    command()
                command = self._commands.get_nowait()
        return ran

    def _poll(self) -> bool:
        """Move every endpoint on. Tell whether a notification came in."""
        active = False
        for endpoint, deliver in list(self._endpoints.items()):
            received = endpoint.progress()
            if received:
                active = True
                self.post(partial(deliver, received))
        return active

    def _destroy_all(self) -> None:
        errors = []
        for endpoint in list(self._endpoints):
            try:
                self.destroy(endpoint)
            except TransferError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _fail_all(self) -> None:
        for future in list(self._waiting):
            _fail(future, self._ended())

    def _ended(self) -> AgentClosed:
        return AgentClosed(f"the NIXL thread has ended ({self._failure or 'it was closed'})")


class _Inbox:
    """Hands an agent's notifications to its owner, until the fence."""

    def __init__(self, on_notify: OnNotify) -> None:
        self._on_notify = on_notify
        self.closed = False

    def deliver(self, notifications: list[bytes]) -> None:
        """Called on the event loop."""
        for notification in notifications:
            if not self.closed:
                self._on_notify(notification)


class NixlAgent(Agent):
    """An agent whose endpoint lives on the NIXL thread."""

    def __init__(
        self, thread: NixlThread, endpoint: Endpoint, regions: list[Region], inbox: _Inbox
    ) -> None:
        self.name = endpoint.name
        self.metadata = endpoint.metadata
        self._thread = thread
        self._endpoint = endpoint
        self._regions = regions
        self._inbox = inbox
        self._fence: asyncio.Future[None] | None = None

    @property
    def stats(self) -> AgentStats:
        """Counters; they go on counting nothing after the fence."""
        return self._endpoint.stats

    async def connect(self, metadata: bytes, timeout: float) -> str:  # noqa: ASYNC109
        """See `Agent.connect`. It does not prove that the peer answers: probe the link."""
        self._check_open()
        try:
            async with asyncio.timeout(timeout):
                return await self._thread.call(partial(self._endpoint.connect, metadata))
        except TimeoutError as error:
            raise PeerLost(f"no connection within {timeout:g} s") from error

    async def disconnect(self, peer: str) -> None:
        """See `Agent.disconnect`."""
        self._check_open()
        await self._thread.call(partial(self._endpoint.disconnect, peer))

    async def write(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        notification: bytes,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """See `Agent.write`."""
        await self._move("WRITE", peer, local, remote, notification, timeout)

    async def read(
        self,
        peer: str,
        local: Ranges,
        remote: Ranges,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        """See `Agent.read`."""
        await self._move("READ", peer, local, remote, b"", timeout)

    async def notify(self, peer: str, notification: bytes) -> None:
        """See `Agent.notify`."""
        self._check_open()
        await self._thread.call(partial(self._endpoint.notify, peer, notification))

    async def fence(self) -> None:
        """See `Agent.fence`. Raises TransferError if the agent could not be ended."""
        self._inbox.closed = True
        if self._endpoint.destroyed:
            return
        if self._fence is None:
            self._fence = asyncio.ensure_future(
                self._thread.call(partial(self._thread.destroy, self._endpoint))
            )
        await asyncio.shield(self._fence)

    def _check_open(self) -> None:
        if self._inbox.closed:
            raise AgentClosed(f"agent {self.name} was fenced")

    async def _move(
        self,
        kind: Literal["READ", "WRITE"],
        peer: str,
        local: Ranges,
        remote: Ranges,
        notification: bytes,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        self._check_open()
        nbytes = check_pairs(local, remote)
        devices_of(local, self._regions)
        future = self._thread.future()
        thread, endpoint = self._thread, self._endpoint

        def finish(error: TransferError | None) -> None:
            thread.post(partial(_settle, future, error))

        operation = Operation(kind, peer, local, remote, nbytes, notification, timeout, finish)
        self._thread.submit(partial(endpoint.start, operation))
        await future


class NixlTransfer(Transfer):
    """One process's NIXL. The library is loaded and the thread started by the first `open`."""

    def __init__(self, settings: NixlSettings | None = None) -> None:
        self._settings = settings or NixlSettings()
        self._thread: NixlThread | None = None
        self._library: NixlLibrary | None = None

    async def open(self, name: str, regions: list[Region], on_notify: OnNotify) -> NixlAgent:
        """See `Transfer.open`. Raises TransferError if NIXL is not installed or refuses."""
        if self._thread is None:
            self._settings.apply()
            self._thread = NixlThread(self._settings, asyncio.get_running_loop())
        thread = self._thread
        inbox = _Inbox(on_notify)

        def open_endpoint() -> Endpoint:
            if self._library is None:
                self._library = NixlLibrary()
            endpoint = Endpoint(
                self._library, name, regions, sockets_only=self._settings.sockets_only
            )
            thread.add(endpoint, inbox.deliver)
            return endpoint

        return NixlAgent(thread, await thread.call(open_endpoint), regions, inbox)

    async def close(self) -> None:
        """See `Transfer.close`. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.close()


def _succeed(future: asyncio.Future[_T], result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _settle(future: asyncio.Future[None], error: TransferError | None) -> None:
    if error is None:
        _succeed(future, None)
    else:
        _fail(future, error)


def _nothing() -> None:
    """Wake the thread."""
