from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from penstock_router.openai.merge import merged

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Source:
    """A stream that notes when it is closed."""

    def __init__(self, items: list[int], error: Exception | None = None) -> None:
        self.items = items
        self.error = error
        self.closed = False

    async def stream(self) -> AsyncGenerator[int]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("count", [1, 3])
async def test_all_items_come_in_their_streams_order(count: int) -> None:
    sources = [Source(list(range(at * 10, at * 10 + 5))) for at in range(count)]
    got = [item async for item in merged([source.stream() for source in sources])]
    assert Counter(got) == Counter(item for source in sources for item in source.items)
    for source in sources:
        assert [item for item in got if item in source.items] == source.items
        assert source.closed


@pytest.mark.parametrize("count", [1, 3])
async def test_an_error_ends_all(count: int) -> None:
    sources = [Source([1], ValueError("x")), *(Source([2] * 10_000) for _ in range(count - 1))]
    with pytest.raises(ValueError, match="x"):
        async for _ in merged([source.stream() for source in sources]):
            pass
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_all(count: int) -> None:
    sources = [Source([1] * 10_000) for _ in range(count)]
    async with aclosing(merged([source.stream() for source in sources])) as items:
        for _ in range(5):
            await anext(items)
    assert all(source.closed for source in sources)
