"""Starts peers as processes of their own, drives them, stops and kills them."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock_runtime.transfer import base

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Sequence

ROOT = Path(__file__).parents[3]
DEADLINE = 30.0
"""Seconds that any single answer may take."""


class Process:
    """A peer process, seen from the test."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._notifications: dict[str, asyncio.Queue[bytes]] = {}
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, memory: str = "host") -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.integration.transfer.peer",
                str(theirs.fileno()),
                memory,
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        return cls(process, reader, writer)

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            message = json.loads(line)
            if "notification" in message:
                payload = bytes.fromhex(message["notification"])
                self.notifications(message["agent"]).put_nowait(payload)
                continue
            waiting = self._waiting.pop(message["id"])
            if waiting.done():
                continue
            if "error" in message:
                waiting.set_exception(getattr(base, message["error"])(message["message"]))
            else:
                waiting.set_result(message["result"])
        for waiting in self._waiting.values():
            waiting.cancel()

    def begin(self, verb: str, **arguments: object) -> asyncio.Future[Any]:
        """Send a command and return the future of its answer."""
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        request = {"id": number, "verb": verb, **arguments}
        self._writer.write(json.dumps(request).encode() + b"\n")
        return future

    async def call(self, verb: str, **arguments: object) -> Any:
        return await asyncio.wait_for(self.begin(verb, **arguments), DEADLINE)

    def notifications(self, agent: str) -> asyncio.Queue[bytes]:
        return self._notifications.setdefault(agent, asyncio.Queue())

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End the process as a crash does, and wait for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await asyncio.wait_for(self._process.wait(), DEADLINE)
        await self._listener
        self._writer.close()

    async def leave(self) -> None:
        """Let the process end by itself."""
        self._writer.write_eof()
        code = await asyncio.wait_for(self._process.wait(), DEADLINE)
        await self._listener
        self._writer.close()
        assert code == 0, f"a peer process ended with {code}"


@asynccontextmanager
async def processes(n: int, memory: str = "host") -> AsyncIterator[list[Process]]:
    """Start n peers with arenas in host or cuda memory, and leave none behind."""
    started = [await Process.start(memory) for _ in range(n)]
    try:
        yield started
    finally:
        for process in started:
            await process.kill()


@dataclass
class End:
    """An agent over an arena in a peer process."""

    process: Process
    name: str
    arena: str
    base: int
    metadata: str
    pages: int

    @classmethod
    async def open(
        cls, process: Process, name: str, pages: int, page_bytes: int, *, seed: int | None = None
    ) -> End:
        """Open an agent over a new arena of zeros, or of random bytes."""
        arena = f"arena of {name}"
        address = await process.call(
            "arena", arena=arena, pages=pages, page_bytes=page_bytes, fill=0
        )
        if seed is not None:
            await process.call("randomize", arena=arena, seed=seed)
        metadata = await process.call("open", agent=name, arena=arena)
        return cls(process, name, arena, address, metadata, pages)

    async def reopen(self, name: str) -> End:
        """Open a further agent over the same arena."""
        metadata = await self.process.call("open", agent=name, arena=self.arena)
        return End(self.process, name, self.arena, self.base, metadata, self.pages)

    async def connect(self, peer: End) -> None:
        await self.process.call("connect", agent=self.name, metadata=peer.metadata)

    def write(
        self,
        peer: End,
        here: Sequence[int] | None = None,
        there: Sequence[int] | None = None,
        notification: bytes = b"written",
        seconds: float = DEADLINE,
    ) -> asyncio.Future[Any]:
        """Begin to write pages, all of them unless told which."""
        return self.process.begin(
            "write",
            agent=self.name,
            arena=self.arena,
            peer=peer.name,
            base=peer.base,
            here=list(range(self.pages) if here is None else here),
            there=list(range(self.pages) if there is None else there),
            notification=notification.hex(),
            seconds=seconds,
        )

    def read(
        self,
        peer: End,
        here: Sequence[int],
        there: Sequence[int],
        seconds: float = DEADLINE,
    ) -> asyncio.Future[Any]:
        return self.process.begin(
            "read",
            agent=self.name,
            arena=self.arena,
            peer=peer.name,
            base=peer.base,
            here=list(here),
            there=list(there),
            seconds=seconds,
        )

    async def notify(self, peer: End, notification: bytes) -> None:
        await self.process.call(
            "notify", agent=self.name, peer=peer.name, notification=notification.hex()
        )

    async def notified(self) -> bytes:
        queue = self.process.notifications(self.name)
        return await asyncio.wait_for(queue.get(), DEADLINE)

    def is_silent(self) -> bool:
        """Tell whether no notification waits."""
        return self.process.notifications(self.name).empty()

    async def fence(self) -> None:
        await self.process.call("fence", agent=self.name)

    async def in_flight(self) -> int:
        count: int = await self.process.call("in_flight", agent=self.name)
        return count

    async def checksums(self, pages: Sequence[int] | None = None) -> list[int]:
        sums: list[int] = await self.process.call(
            "checksums", arena=self.arena, pages=None if pages is None else list(pages)
        )
        return sums
