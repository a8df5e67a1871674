"""A process with NIXL agents that does what a test tells it over a socket, one JSON a line.

Run as `python -m tests.integration.transfer.peer FD MEMORY`, with host or cuda for the arenas'
memory; `processes.Process` starts and drives it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from functools import partial
from typing import Any

from penstock_runtime.transfer.base import TransferError
from penstock_runtime.transfer.nixl import NixlAgent, NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.transfer.rdma import ucx_transports
from tests.integration.transfer.arena import Arena, page_ranges


class Peer:
    """Executes commands; each may take long, and others go on meanwhile."""

    def __init__(self, writer: asyncio.StreamWriter, device: str) -> None:
        self._writer = writer
        self._device = device
        transports = ucx_transports(rdma=False, device=device)
        self._transfer = NixlTransfer(
            NixlSettings(transports=transports, devices="lo", peer_silence_seconds=60)
        )
        self._agents: dict[str, NixlAgent] = {}
        self._arenas: dict[str, Arena] = {}

    def send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def execute(self, request: dict[str, Any]) -> None:
        number, verb = request.pop("id"), request.pop("verb")
        try:
            result = await getattr(self, f"do_{verb}")(**request)
        except TransferError as error:
            self.send({"id": number, "error": type(error).__name__, "message": str(error)})
        else:
            self.send({"id": number, "result": result})

    async def do_arena(self, arena: str, pages: int, page_bytes: int, fill: int) -> int:
        self._arenas[arena] = await asyncio.to_thread(self._arena, pages, page_bytes, fill)
        return self._arenas[arena].base

    def _arena(self, pages: int, page_bytes: int, fill: int) -> Arena:
        if self._device == "cpu":
            return Arena(pages, page_bytes, fill)
        # torch, and a GPU: only for the tests that ask for it.
        from tests.integration.transfer.device_arena import DeviceArena

        return DeviceArena(pages, page_bytes, fill)

    async def do_open(self, agent: str, arena: str) -> str:
        notify = partial(self._notified, agent)
        opened = await self._transfer.open(agent, [self._arenas[arena].region], notify)
        self._agents[agent] = opened
        return opened.metadata.hex()

    def _notified(self, agent: str, payload: bytes) -> None:
        self.send({"agent": agent, "notification": payload.hex()})

    async def do_connect(self, agent: str, metadata: str) -> str:
        return await self._agents[agent].connect(bytes.fromhex(metadata), 10)

    async def do_disconnect(self, agent: str, peer: str) -> None:
        await self._agents[agent].disconnect(peer)

    async def do_write(
        self,
        agent: str,
        arena: str,
        peer: str,
        base: int,
        here: list[int],
        there: list[int],
        notification: str,
        seconds: float,
    ) -> None:
        source = self._arenas[arena]
        await self._agents[agent].write(
            peer,
            source.ranges(here),
            page_ranges(base, source.page_bytes, there),
            bytes.fromhex(notification),
            seconds,
        )

    async def do_read(
        self,
        agent: str,
        arena: str,
        peer: str,
        base: int,
        here: list[int],
        there: list[int],
        seconds: float,
    ) -> None:
        target = self._arenas[arena]
        await self._agents[agent].read(
            peer, target.ranges(here), page_ranges(base, target.page_bytes, there), seconds
        )

    async def do_notify(self, agent: str, peer: str, notification: str) -> None:
        await self._agents[agent].notify(peer, bytes.fromhex(notification))

    async def do_fence(self, agent: str) -> None:
        await self._agents[agent].fence()

    async def do_in_flight(self, agent: str) -> int:
        return self._agents[agent].stats.in_flight

    async def do_randomize(self, arena: str, seed: int) -> None:
        self._arenas[arena].randomize(seed)

    async def do_fill(self, arena: str, value: int) -> None:
        self._arenas[arena].fill(value)

    async def do_values(self, arena: str) -> list[int]:
        """Return the distinct byte values of an arena."""
        return sorted(set(self._arenas[arena].bytes()))

    async def do_checksums(self, arena: str, pages: list[int] | None) -> list[int]:
        return self._arenas[arena].checksums(pages)

    async def close(self) -> None:
        await self._transfer.close()


async def main(descriptor: int, memory: str) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    peer = Peer(writer, "cpu" if memory == "host" else memory)
    running: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(peer.execute(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await peer.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
