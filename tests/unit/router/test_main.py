"""The router as a process, over real CURVE links, against a worker in the test."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from penstock_router.main import main
from penstock_router.server import CloseWhenDraining
from penstock_wire.keys import Keys
from penstock_wire.messages import (
    Cancel,
    Control,
    Generate,
    Hello,
    Load,
    Snapshot,
    Subscribe,
    TokenOut,
    Tokens,
)
from penstock_wire.sockets import ControlServer, Session
from tests.unit.router.tiny_models import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.types import Receive, Scope, Send

    from penstock_router.readiness import Readiness


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Worker:
    """A decode worker on a real control server that gives one token for each call of `step`."""

    def __init__(self, keys: Keys) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.streams: dict[str, tuple[Session, int]] = {}
        self.changed = asyncio.Event()
        self.server = ControlServer(
            self.address,
            hello=lambda: Hello(
                role="decode", name="d0", boot_id="b", pages=100, page_size=4, max_model_len=512
            ),
            keys=keys,
            on_message=self._take,
            on_join=lambda _: None,
            on_lost=lambda _: None,
        )

    def _take(self, session: Session, message: Control) -> None:
        match message:
            case Subscribe():
                session.send(Snapshot(seq=0, hashes=b""))
                session.send(Load(state="ready", pages_free=100, pages_total=100))
            case Generate() if message.sampling.max_tokens == 1:
                tokens = (TokenOut(20),)
                session.send(
                    Tokens(
                        request_id=message.request_id, position=0, tokens=tokens, finish="length"
                    )
                )
            case Generate():
                self.streams[message.request_id] = (session, 0)
            case Cancel():
                self.streams.pop(message.request_id, None)
        self.changed.set()

    def step(self, *, finish: bool = False) -> None:
        for request_id, (session, position) in self.streams.items():
            session.send(
                Tokens(
                    request_id=request_id,
                    position=position,
                    tokens=(TokenOut(30 + position),),
                    finish="length" if finish else "",
                )
            )
            self.streams[request_id] = (session, position + 1)

    async def step_once_asked(self) -> None:
        async with asyncio.timeout(10):
            while not self.streams:
                self.changed.clear()
                await self.changed.wait()
        self.step()


def _flags(tmp_path: Path, port: int) -> list[str]:
    model = write_checkpoint(tmp_path / "model")
    return [
        *("--model", f"file://{model}", "--served-model-name", "tiny"),
        *("--discovery", f"file:{tmp_path / 'endpoints.json'}"),
        *("--keys", str(tmp_path / "keys"), "--port", str(port)),
    ]


@asynccontextmanager
async def router_process(tmp_path: Path, fd: int | None = None) -> AsyncIterator[tuple[Any, str]]:
    port = free_port()
    inherited = [] if fd is None else ["--fd", str(fd)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "penstock_router.main", *_flags(tmp_path, port), *inherited),
        stderr=asyncio.subprocess.PIPE,
        pass_fds=() if fd is None else (fd,),
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if (await http.get("/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


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
        async with asyncio.timeout(50), router_process(tmp_path, fd) as (first, _):
            early_reader, early = await asyncio.open_connection("127.0.0.1", port)
            early.write(ask)
            await early_reader.readuntil(b"}")  # it serves, and the connection stays open
            first.send_signal(signal.SIGTERM)
            early.write(ask)
            assert (await early_reader.read()).startswith(b"HTTP/1.1 200"), "answered, then closed"
            late_reader, late = await asyncio.open_connection("127.0.0.1", port)
            late.write(ask)
            assert await first.wait() == 0
            async with router_process(tmp_path, fd):
                assert (await late_reader.readline()).startswith(b"HTTP/1.1 200")
                late.close()
                await late.wait_closed()
            early.close()
            await early.wait_closed()


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
    ("flags", "text"),
    [
        (("--fd", "0"), "--fd 0 is "),
        (("--fd", "-3"), "--fd -3 is not a file descriptor"),
        (("--model", "file:///nowhere"), "/nowhere is not there"),
        (("--discovery", "dns:x"), "write file:PATH"),
        (("--max-queue", "0"), "--max-queue must be at least 1"),
    ],
)
def test_a_router_that_cannot_start_says_why(
    tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    Keys.generate().save(tmp_path / "keys")
    with pytest.raises(SystemExit, match=text) as caught:
        main([*_flags(tmp_path, free_port()), *flags])
    assert isinstance(caught.value.code, str)
