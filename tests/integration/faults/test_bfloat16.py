"""In bfloat16 a stream may part from the undisturbed one, but only at a near tie."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest
import torch

from tests.integration.faults.cluster import service
from tests.integration.faults.near_tie import errors, parting
from tests.integration.faults.streams import Reference, Stream, prompt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.faults.cluster import Cluster

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

_COUNT = 240


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    with service(tmp_path_factory.mktemp("bfloat16"), model, dtype="bfloat16") as found:
        found.up()
        yield found


async def test_a_killed_decode_workers_streams_go_on_up_to_rounding(
    bfloat16: Cluster, model: Path
) -> None:
    await bfloat16.ready()
    rounded = Reference(model, rounded_to=torch.bfloat16)
    prompts = [prompt(500 + i, 50 + 80 * i) for i in range(4)]
    async with bfloat16.client() as client:
        undisturbed = [await Stream(p, _COUNT).read(client) for p in prompts]
        streams = [Stream(p, _COUNT) for p in prompts]
        outputs = asyncio.gather(*(stream.read(client) for stream in streams))
        await asyncio.gather(*(stream.reaches(40) for stream in streams))
        busy = [(await bfloat16.worker(f"decode-{i}"))["pages"]["resident"] for i in range(2)]
        victim = f"decode-{busy.index(max(busy))}"
        pid = bfloat16.signal(victim, signal.SIGKILL)
        for tokens, calm, disturbed in zip(prompts, undisturbed, await outputs, strict=True):
            assert errors(rounded, tokens, calm) == []
            assert errors(rounded, tokens, disturbed) == [], f"parts at {parting(calm, disturbed)}"
    await bfloat16.replaced(victim, pid)
    await bfloat16.settled()
