"""NIXL keeps the contract of the transfer interface, between agents of one process over TCP.

And its threads wait for the agents' sockets: they may nap for a minute, and all goes on at once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from penstock_runtime.transfer.base import Region
from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from tests.integration.transfer.contract import CONTRACT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_runtime.transfer.base import Transfer


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
async def test_contract(promise: Callable[[Transfer], Awaitable[None]]) -> None:
    transfer = NixlTransfer(NixlSettings(devices="lo"))
    try:
        await promise(transfer)
    finally:
        await transfer.close()


NBYTES = 16 * 1024 * 1024


async def test_sockets_wake_a_thread_that_expects_nothing() -> None:
    settings = NixlSettings(devices="lo", nap_watched_seconds=60.0, linger_seconds=60.0)
    ours, theirs = NixlTransfer(settings), NixlTransfer(settings)
    source = np.random.default_rng(1).integers(0, 256, NBYTES, np.uint8)
    target, back = np.zeros_like(source), np.zeros_like(source)
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    try:
        async with asyncio.timeout(30):
            here = await ours.open("here/1", [region(source), region(back)], heard.put_nowait)
            there = await theirs.open("there/1", [region(target)], heard.put_nowait)
            to_there = await here.connect(there.metadata, 5)
            to_here = await there.connect(here.metadata, 5)
            for number in range(5):
                # Until both threads wait for a minute: nothing tells when they do.
                await asyncio.sleep(100 * settings.spacing_seconds)
                await here.notify(to_there, b"out")
                assert await heard.get() == b"out"
                await there.notify(to_here, b"home")
                assert await heard.get() == b"home"
                size = NBYTES >> 4 * number
                ends = ranges(source, size), ranges(target, size)
                await here.write(to_there, *ends, b"written", 20)
                assert await heard.get() == b"written"
                assert np.array_equal(target[:size], source[:size])
                await here.read(to_there, ranges(back, size), ranges(target, size), 20)
                assert np.array_equal(back[:size], source[:size])
    finally:
        await ours.close()
        await theirs.close()


def region(memory: np.ndarray) -> Region:
    return Region(memory.ctypes.data, memory.nbytes)


def ranges(memory: np.ndarray, size: int) -> np.ndarray:
    return np.array([[memory.ctypes.data, size]], np.uint64)
