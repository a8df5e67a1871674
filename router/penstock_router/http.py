"""HTTP around the API: bodies with a limit, event streams, disconnects, the key check."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.responses import JSONResponse, Response

from penstock_router.errors import ApiError, InternalError, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from fastapi import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from penstock_router.auth import KeyFile

import msgspec

log = logging.getLogger(__name__)

T = TypeVar("T")

_WRITES_A_TURN = 4
"""Events written before the event loop gets its turn. A burst of tokens would otherwise be written
to the end into a connection that broke with its first bytes, of which asyncio complains from the
fifth write on; and other streams would wait."""
OPEN_PATHS = frozenset({"/health", "/ready", "/accepting", "/metrics"})
"""Answered without a key: probes and Prometheus have none, and they tell no content."""


class Disconnected(Exception):  # noqa: N818 - it names the state
    """The client does not wait any more."""


class BearerAuth:
    """ASGI middleware that asks for a key on every path but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            try:
                self._keys.check(header)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(error: ApiError) -> Response:
    """Return the response that tells `error`."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def read_body(request: Request, limit: int) -> bytes:
    """Return the request's body. Raises TooLarge over `limit` bytes, before reading more."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isascii() and declared.isdigit() else 0
    parts: list[bytes] = []
    received = 0
    if size <= limit:
        async for part in request.stream():
            received += len(part)
            if received > limit:
                break
            parts.append(part)
    if max(size, received) > limit:
        raise TooLarge(
            f"the body is over the limit of {limit} bytes; send a shorter prompt",
            code="body_too_large",
        )
    return b"".join(parts)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; it is cancelled when the client goes away.

    Raises:
        Disconnected: the client went away first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    The status waits for the first event, so that a request that fails before it is answered with
    the right status; after `keepalive` seconds of silence it goes out, and comments after it, so
    that no proxy takes a long prefill for a dead connection. An error after that is an event.

    Args:
        events: whole events; closed when the client goes away.
        keepalive: seconds of silence before a comment.
        on_end: called once with the outcome: an HTTP status, "error" after the headers went out,
            or "cancelled".
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        keepalive: float,
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keepalive = keepalive
        self._on_end = on_end
        self._started = False
        self._last_sent = 0.0
        self._written = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events end or the client is gone."""
        outcome = "cancelled"
        alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            outcome = await until_disconnect(receive, self._stream(scope, receive, send))
        except (Disconnected, OSError) as gone:
            log.debug("a client closed its stream: %r", gone)
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)
            self._on_end(outcome)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> str:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, event)
        except ApiError as error:
            failure = error
        except OSError:
            raise
        except Exception:
            log.exception("a stream failed")
            failure = InternalError("the router failed; see its log", code="internal")
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return "200"
        if not self._started:
            self._started = True
            await error_response(failure)(scope, receive, send)
            return str(failure.status)
        await self._send(send, b"data: " + msgspec.json.encode(failure.body()) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "error"

    async def _send(self, send: Send, data: bytes) -> None:
        self._last_sent = time.monotonic()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._written += 1
        if self._written % _WRITES_A_TURN == 0:
            await asyncio.sleep(0)

    async def _keep_alive(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while True:
            await asyncio.sleep(self._last_sent + self._keepalive - time.monotonic())
            if time.monotonic() >= self._last_sent + self._keepalive:
                await self._send(send, b": keep-alive\n\n")
