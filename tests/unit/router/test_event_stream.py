"""Event streams on a real server, when the client's connection breaks."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import TYPE_CHECKING

import uvicorn

from penstock_router.http import EventStream
from tests.unit.router.harness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import pytest
    from starlette.types import Receive, Scope, Send


async def test_a_burst_into_a_broken_connection_stops_without_noise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The break and the burst come in the same turn of the event loop."""
    burst = asyncio.Event()
    outcomes: list[str] = []
    written = 0

    async def events() -> AsyncGenerator[bytes]:
        nonlocal written
        yield b"data: first\n\n"
        await burst.wait()
        for _ in range(1000):
            written += 1
            yield b"data: more\n\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(events(), keepalive=60, on_end=outcomes.append)(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await eventually(lambda: server.started)
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        await reader.readuntil(b"data: first")
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # With lingering off a close is a reset; it is there when the burst begins.
        writer.transport.abort()
        await asyncio.sleep(0)
        burst.set()
        await eventually(lambda: bool(outcomes))
        server.should_exit = True
        await serving
    assert outcomes == ["cancelled"]
    assert written < 20, "what nobody reads is not written to the end"
    noise = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not noise
