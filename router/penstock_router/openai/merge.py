"""Several streams as one, in the order in which their items come."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Yield the items of all `streams` as they come, until all have ended.

    The first error of any of them ends all. So does closing the iterator.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    # One slot a stream: a slow client slows its generators down instead of filling memory.
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue(maxsize=len(streams))
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            got = await queue.get()
            if got is None:
                running -= 1
            elif isinstance(got, Exception):
                raise got
            else:
                yield got[0]
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    stream: AsyncGenerator[T], queue: asyncio.Queue[tuple[T] | Exception | None]
) -> None:
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await queue.put((item,))
    except Exception as error:  # noqa: BLE001 - raised again by the reader
        await queue.put(error)
    else:
        await queue.put(None)
