"""KV pages between two processes' GPU memories over NIXL: every byte, after its notification."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from penstock_runtime.transfer.base import TransferError
from tests.integration.transfer.processes import DEADLINE, End, processes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

PAGES, PAGE_BYTES = 64, 64 * 1024


@pytest.mark.parametrize("memories", [("cuda", "cuda"), ("cuda", "host"), ("host", "cuda")])
async def test_random_pages_arrive_and_come_back(memories: tuple[str, str]) -> None:
    async with processes(1, memories[0]) as (one,), processes(1, memories[1]) as (two,):
        here = await End.open(one, "source/1", PAGES, PAGE_BYTES, seed=5)
        there = await End.open(two, "target/1", PAGES, PAGE_BYTES)
        await here.connect(there)
        await here.notify(there, b"nonce")
        assert await there.notified() == b"nonce"
        rng = random.Random(1)
        sums, expected = await here.checksums(), await there.checksums()
        for number in range(6):
            count = rng.randrange(1, PAGES)
            source, target = rng.sample(range(PAGES), count), rng.sample(range(PAGES), count)
            write = here.write(there, source, target, str(number).encode())
            await asyncio.wait_for(write, DEADLINE)
            assert await there.notified() == str(number).encode()
            for page, landed in zip(source, target, strict=True):
                expected[landed] = sums[page]
            assert await there.checksums() == expected
        await asyncio.wait_for(here.read(there, range(PAGES), range(PAGES)), DEADLINE)
        assert await here.checksums() == expected


async def test_a_fence_ends_a_write_into_device_memory() -> None:
    async with processes(2, "cuda") as (one, two):
        here = await End.open(one, "source/1", PAGES, PAGE_BYTES, seed=5)
        there = await End.open(two, "target/1", PAGES, PAGE_BYTES)
        await here.connect(there)
        write = here.write(there)
        await there.fence()
        with contextlib.suppress(TransferError):
            await asyncio.wait_for(write, DEADLINE)
        after = await there.checksums()
        await asyncio.sleep(1)
        assert await there.checksums() == after
