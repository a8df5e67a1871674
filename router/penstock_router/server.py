"""The HTTP server: where it listens, and how it ends without losing a request.

Beside its own address a router may serve an inherited listening socket that other processes share:
a launcher binds the API's address once and hands it to each router that comes. Connections wait in
the kernel's backlog while there is none, and a router that ends leaves those that it has not
accepted to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import TYPE_CHECKING, Protocol, cast

import uvicorn

from penstock_router.errors import ConfigurationError
from penstock_wire.rhythm import until_next

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from penstock_router.readiness import Readiness

log = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait to be accepted: a burst, or what comes in while a router restarts."""
_LAST_ASK_SECONDS = 1.0
"""How long open connections may still bring a request when the router drains. One that was just
accepted sends its request within a round trip, and must not be closed without an answer."""
_POLL_SECONDS = 0.02
_DATE_SECONDS = 1.0
"""Between two looks at the clock for the Date of answers, which has whole seconds."""


def listeners(host: str, port: int, inherited: int | None) -> list[socket.socket]:
    """Return the listening sockets: our own at host:port, then an inherited one if there is.

    Raises ConfigurationError, with the reason, if one of them cannot be had.
    """
    found = [_bind(host, port)]
    if inherited is not None:
        try:
            found.append(_adopt(inherited))
        except ConfigurationError:
            found[0].close()
            raise
    return found


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio sets TCP_NODELAY on such sockets only.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error}; choose another --host or --port"
        ) from error
    return listener


def _adopt(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigurationError(f"--fd {descriptor} is no socket: {error}") from error
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise ConfigurationError(f"--fd {descriptor} is a socket that does not listen")
    # It stays ours: a child process must not keep the API's address open.
    listener.set_inheritable(False)
    return listener


class _Cycle(Protocol):
    """A request and its answer, as uvicorn's HTTP protocols keep it."""

    response_complete: bool


class _Connection(Protocol):
    """What is read of a connection of uvicorn's: its last request, if there was one."""

    cycle: _Cycle | None


class CloseWhenDraining:
    """Middleware: answers of a draining router end their connection.

    So a client that keeps connections alive asks the next router with its next request.
    """

    def __init__(self, app: ASGIApp, readiness: Readiness) -> None:
        self._app = app
        self._readiness = readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._readiness.draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, closing if scope["type"] == "http" else send)


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then not ready at once, and streams may end.

    A second signal ends the streams too. The process exits with 0 after a drain.

    Args:
        config: uvicorn's.
        readiness: is told of the drain.
        own: the listening socket that nobody else serves.
    """

    def __init__(self, config: uvicorn.Config, readiness: Readiness, *, own: socket.socket) -> None:
        super().__init__(config)
        self._readiness = readiness
        self._own = own
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals in the event loop, and keep them from ending the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _drain(self) -> None:
        if self.should_exit:
            self.force_exit = True
        log.info("draining: no new connections, open streams may end")
        self._readiness.draining = True
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """Keep the Date of answers until the drain. uvicorn's own asks ten times a second for it.

        0 stands for a tick that renews the Date.
        """
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_next(_DATE_SECONDS)):
                    await self._ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let open connections ask a last time, and let answers end.

        The server behind this one closes every connection that has no request at this moment. One
        whose request is on its way would see it lost, so those are given the time to arrive first.
        """
        loop = asyncio.get_running_loop()
        for listener in sockets or []:
            loop.remove_reader(listener)
        # What the loop has just accepted becomes a connection in its next pass. A server that is
        # closed before that drops it without a word.
        await asyncio.sleep(0)
        waiting = self._accept_rest()
        for server in self.servers:
            server.close()
        for connection in waiting:
            await loop.connect_accepted_socket(self._protocol, connection)
        deadline = loop.time() + _LAST_ASK_SECONDS
        while (  # noqa: ASYNC110 - the connections are uvicorn's, and announce nothing
            self._silent() and not self.force_exit and loop.time() < deadline
        ):
            await asyncio.sleep(_POLL_SECONDS)
        await super().shutdown(sockets)

    def _accept_rest(self) -> list[socket.socket]:
        """Return the connections that wait at our own address.

        Closing the listening socket resets them, though their clients believe to be connected. At
        an inherited one they wait for the next router.
        """
        found: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._own.accept()
                connection.setblocking(False)
                found.append(connection)
        return found

    def _protocol(self) -> asyncio.Protocol:
        """Return what serves one connection, as uvicorn makes it for those that it accepts."""
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _silent(self) -> bool:
        """Tell whether a connection is open that no request is being answered on.

        Asked of each: tasks cannot be counted against connections, since one goes on for a moment
        when its answer is complete and its connection gone.
        """
        connections = cast("set[_Connection]", self.server_state.connections)
        return any(each.cycle is None or each.cycle.response_complete for each in connections)
