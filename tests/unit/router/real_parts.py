"""A router process and a worker in the test, over real CURVE links and HTTP."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

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

    from penstock_wire.keys import Keys


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Worker:
    """A decode worker on a real control server that gives one token for each call of `step`."""

    def __init__(self, keys: Keys, address: str = "") -> None:
        self.address = address or f"127.0.0.1:{free_port()}"
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


def flags(tmp_path: Path, port: int) -> list[str]:
    model = write_checkpoint(tmp_path / "model")
    return [
        *("--model", f"file://{model}", "--served-model-name", "tiny"),
        *("--discovery", f"file:{tmp_path / 'endpoints.json'}"),
        *("--keys", str(tmp_path / "keys"), "--port", str(port)),
    ]


@asynccontextmanager
async def router_process(
    tmp_path: Path, *more: str, fd: int | None = None
) -> AsyncIterator[tuple[Any, str]]:
    port = free_port()
    inherited = [] if fd is None else ["--fd", str(fd)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "penstock_router.main"),
        *(*flags(tmp_path, port), *inherited, *more),
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
