"""The router as a process, over real CURVE links, against a worker in the test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import httpx
import pytest
import uvicorn

from penstock_router.main import main
from penstock_router.server import CloseWhenDraining, Server, listeners
from penstock_wire.keys import Keys
from tests.unit.router.real_parts import Worker, free_port, router_process, until_ready
from tests.unit.router.real_parts import flags as flags_of

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

    from penstock_router.readiness import Readiness


async def test_a_router_serves_and_drains_on_sigterm(tmp_path: Path) -> None:
    keys = Keys.generate()
    keys.save(tmp_path / "keys")
    worker = Worker(keys)
    await worker.server.start()
    endpoint = {"name": "d0", "role": "decode", "address": worker.address}
    (tmp_path / "endpoints.json").write_text(json.dumps({"endpoints": [endpoint]}))
    body = {"model": "tiny", "prompt": "hello", "stream": True, "max_tokens": 8}
    try:
        async with (
            router_process(tmp_path) as (process, url),
            httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http,
        ):
            await until_ready(http)
            port = httpx.URL(url).port
            first = asyncio.create_task(worker.step_once_asked())
            async with http.stream("POST", "/v1/completions", json=body) as response:
                await first
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: {")
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(10):
                    while True:  # it stops accepting while the stream is open
                        try:
                            _, writer = await asyncio.open_connection("127.0.0.1", port)
                        except ConnectionRefusedError:
                            break
                        writer.close()
                        await asyncio.sleep(0.05)
                worker.step()
                worker.step(finish=True)
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert len(rest) == 3
            async with asyncio.timeout(10):
                assert await process.wait() == 0
    finally:
        await worker.server.close()


async def test_routers_that_share_a_socket_lose_no_connection(tmp_path: Path) -> None:
    """One that drains answers what it has accepted; the rest waits in the kernel for the next."""
    Keys.generate().save(tmp_path / "keys")
    (tmp_path / "endpoints.json").write_text(json.dumps({"endpoints": []}))
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as shared:
        port, fd = shared.getsockname()[1], shared.fileno()
        async with asyncio.timeout(50), router_process(tmp_path, fd=fd) as (first, _):
            early_reader, early = await asyncio.open_connection("127.0.0.1", port)
            early.write(ask)
            await early_reader.readuntil(b"}")  # it serves, and the connection stays open
            first.send_signal(signal.SIGTERM)
            early.write(ask)
            assert (await early_reader.read()).startswith(b"HTTP/1.1 200"), "answered, then closed"
            late_reader, late = await asyncio.open_connection("127.0.0.1", port)
            late.write(ask)
            assert await first.wait() == 0
            async with router_process(tmp_path, fd=fd):
                assert (await late_reader.readline()).startswith(b"HTTP/1.1 200")
                late.close()
                await late.wait_closed()
            early.close()
            await early.wait_closed()


async def serving(app: ASGIApp) -> tuple[Server, socket.socket]:
    """Return a server that drains as soon as it is shut down, and its listening socket."""
    readiness = cast("Readiness", SimpleNamespace(draining=True))
    listener = listeners("127.0.0.1", 0, None)[0]
    config = uvicorn.Config(CloseWhenDraining(app, readiness), log_config=None, lifespan="off")
    config.load()
    server = Server(config, readiness, own=listener)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    return server, listener


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


@pytest.mark.parametrize("passes", range(5))
async def test_a_connection_that_comes_while_the_router_stops_is_not_reset(passes: int) -> None:
    """It is in the kernel's queue then, accepted, or about to become a connection."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await answer(send)

    server, listener = await serving(app)
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(passes):  # of the event loop: each takes a step with the connection
            await asyncio.sleep(0)
        await server.shutdown([listener])
        received = b"".join(iter(lambda: client.recv(4096), b""))
    assert received.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in received.lower()


async def test_a_silent_connection_may_ask_though_another_is_still_ending() -> None:
    """A request whose answer is complete does not stand for one that is still to come."""
    may_end = asyncio.Event()

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        await answer(send)
        if scope["path"] == "/lingers":
            await may_end.wait()

    server, listener = await serving(app)
    async with asyncio.timeout(20):
        reader, silent = await asyncio.open_connection(*listener.getsockname())
        lingers_reader, lingers = await asyncio.open_connection(*listener.getsockname())
        lingers.write(b"GET /lingers HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await lingers_reader.read()).startswith(b"HTTP/1.1 200")
        stopping = asyncio.create_task(server.shutdown([listener]))
        for _ in range(10):  # enough for it to close what it takes for idle
            await asyncio.sleep(0)
        silent.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        may_end.set()
        await stopping
    for writer in (silent, lingers):
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("draining", [True, False])
async def test_answers_of_a_draining_router_end_their_connection(draining: bool) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    readiness = SimpleNamespace(draining=draining)
    transport = httpx.ASGITransport(CloseWhenDraining(app, cast("Readiness", readiness)))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        assert (await http.get("/")).headers.get("connection") == ("close" if draining else None)


@pytest.mark.parametrize(
    ("flags", "text", "status"),
    [
        (("--fd", "0"), "--fd 0 is ", os.EX_CONFIG),
        (("--fd", "-3"), "--fd -3 is not a file descriptor", os.EX_CONFIG),
        (("--model", "file:///nowhere"), "/nowhere is not there", os.EX_NOINPUT),
        (("--discovery", "dns:x"), "write file:PATH", os.EX_CONFIG),
        (("--discovery", "file:"), "write file:PATH", os.EX_CONFIG),
        (("--discovery", "kubernetes:n/a=b"), "needs --kubernetes-api", os.EX_CONFIG),
        (("--max-queue", "0"), "--max-queue must be at least 1", os.EX_CONFIG),
        (("--keys", "/nowhere"), "/nowhere", os.EX_CONFIG),
    ],
)
def test_a_router_that_cannot_start_says_why(
    tmp_path: Path,
    flags: tuple[str, ...],
    text: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    Keys.generate().save(tmp_path / "keys")
    with pytest.raises(SystemExit) as caught:
        main([*flags_of(tmp_path, free_port()), *flags])
    assert caught.value.code == status
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
def test_a_model_that_cannot_be_read_has_its_own_status(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Keys.generate().save(tmp_path / "keys")
    flags = flags_of(tmp_path, free_port())
    (tmp_path / "model" / broken).write_text("{")
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == os.EX_NOINPUT
    assert broken in capsys.readouterr().err
