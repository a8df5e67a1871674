"""The death of a rank is that of its worker: it is started anew, and requests go on unharmed."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.integration.faults.cluster import eventually, gone, service
from tests.integration.faults.streams import Stream, prompt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.faults.cluster import Cluster
    from tests.integration.faults.streams import Reference

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    with service(tmp_path_factory.mktemp("ranks"), model, ranks=2) as found:
        found.up()
        yield found


async def all_gone(pids: list[int]) -> None:
    async def check() -> bool:
        return all(gone(pid) for pid in pids)

    await eventually(check, f"the processes {pids} to end")


@pytest.mark.parametrize("name", ["decode-0", "prefill-0-0", "prefill-0-1"])
async def test_a_rank_is_killed_under_a_stream(
    ranked: Cluster, reference: Reference, name: str
) -> None:
    await ranked.ready()
    worker, ranks = ranked.pid(name), ranked.ranks(name)
    assert len(ranks) == 1
    async with ranked.client() as client:
        stream = Stream(prompt(700, 900), 120)
        output = asyncio.create_task(stream.read(client))
        if name == "decode-0":
            await stream.reaches(20)
        os.kill(ranks[0], signal.SIGKILL)
        assert await output == await asyncio.to_thread(reference.greedy, stream.prompt, 120)
    await ranked.replaced(name, worker)
    assert f"rank 1 of 2 ended with signal {signal.SIGKILL}" in ranked.log(name)
    await ranked.settled()


async def test_ranks_do_not_outlive_their_worker(ranked: Cluster) -> None:
    await ranked.ready()
    ranks = ranked.ranks("decode-0")
    worker = ranked.signal("decode-0", signal.SIGKILL)
    await all_gone(ranks)
    await ranked.replaced("decode-0", worker)
    await ranked.settled()


async def test_down_ends_them_all(ranked: Cluster) -> None:
    await ranked.ready()
    ranks = [pid for name in ranked.pods() if name != "router" for pid in ranked.ranks(name)]
    assert len(ranks) == 4
    assert await asyncio.to_thread(ranked.down) == 0
    await all_gone(ranks)
