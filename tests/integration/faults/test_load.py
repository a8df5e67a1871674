"""Under load: clients that go away, and a restart of every process in turn."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.faults.streams import Stream, complete, prompt

if TYPE_CHECKING:
    from tests.integration.faults.cluster import Cluster
    from tests.integration.faults.streams import Reference, TokenIds

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

_COUNT = 32


async def test_half_of_two_hundred_clients_disconnect(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    rng = random.Random(7)
    prompts = [prompt(100 + i, rng.randrange(2, 400)) for i in range(25)]
    expected = {p: await asyncio.to_thread(reference.greedy, p, _COUNT) for p in prompts}
    gate = asyncio.Semaphore(48)

    async def stay(tokens: TokenIds) -> None:
        async with gate:
            assert await Stream(tokens, _COUNT).read(client) == expected[tokens]

    async def leave(tokens: TokenIds, after: float) -> None:
        async with gate:
            stream = Stream(tokens, _COUNT)
            reader = asyncio.create_task(stream.read(client))
            await asyncio.wait({reader}, timeout=after)
            reader.cancel()
            await asyncio.wait({reader})
            received = stream.tokens[:-1]  # its last word may have been cut
            assert received == expected[tokens][: len(received)]

    chosen = itertools.islice(itertools.cycle(prompts), 100)
    work = [stay(tokens) for tokens in chosen]
    work += [leave(rng.choice(prompts), rng.random() * 1.5) for _ in range(100)]
    rng.shuffle(work)
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
    await cluster.settled()


@dataclass
class Load:
    """Clients that ask one request after another, streamed and not, each checked."""

    cluster: Cluster
    expected: dict[TokenIds, TokenIds]
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    stop: bool = False

    async def run(self, seed: int) -> None:
        """Ask until told to stop."""
        rng = random.Random(seed)
        async with self.cluster.client() as client:
            while not self.stop:
                await self._ask(client, rng)

    async def _ask(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        tokens = rng.choice(list(self.expected))
        try:
            if rng.random() < 0.5:
                output = await Stream(tokens, _COUNT).read(client)
            else:
                output = await complete(client, tokens, _COUNT)
        except (httpx.HTTPError, AssertionError) as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
            return
        self.answered += 1
        if output != self.expected[tokens]:
            self.wrong.append(f"other tokens for a prompt of {len(tokens)}")

    async def some(self, requests: int) -> None:
        """Return when so many more have been answered. The test's timeout is the deadline."""
        goal = self.answered + requests
        while self.answered < goal and not self.wrong:  # noqa: ASYNC110 - clients come and go
            await asyncio.sleep(0.02)


async def test_every_process_is_restarted_in_turn_under_load(
    cluster: Cluster, reference: Reference
) -> None:
    prompts = [prompt(200 + i, 40 + 45 * i) for i in range(10)]
    expected = {p: await asyncio.to_thread(reference.greedy, p, _COUNT) for p in prompts}
    load = Load(cluster, expected)
    clients = [asyncio.create_task(load.run(seed)) for seed in range(4)]
    try:
        for name in ("decode-0", "decode-1", "prefill-0-0", "prefill-0-1", "router-0"):
            await load.some(8)
            pid = cluster.signal(name, signal.SIGTERM)
            await cluster.replaced(name, pid)
            await cluster.ready()
            assert load.wrong == [], f"while {name} was restarted"
        await load.some(8)
    finally:
        load.stop = True
        await asyncio.gather(*clients)
    assert load.wrong == []
    await cluster.settled()
