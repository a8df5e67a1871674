"""Processes are killed and stopped under requests: each goes on with the very tokens."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.faults.cluster import eventually
from tests.integration.faults.streams import Stream, prompt

if TYPE_CHECKING:
    from tests.integration.faults.cluster import Cluster
    from tests.integration.faults.streams import Reference, TokenIds

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

LONG = 7900
"""Tokens of a prompt that is about as long as the model takes."""


def begin(
    client: httpx.AsyncClient, prompts: list[TokenIds], count: int
) -> tuple[list[Stream], asyncio.Future[list[TokenIds]]]:
    """Start a stream for each prompt; the future has their outputs."""
    streams = [Stream(p, count) for p in prompts]
    return streams, asyncio.gather(*(stream.read(client) for stream in streams))


async def check(reference: Reference, streams: list[Stream], outputs: list[TokenIds]) -> None:
    """Each output is the reference's, token by token."""
    for stream, output in zip(streams, outputs, strict=True):
        assert output == await asyncio.to_thread(reference.greedy, stream.prompt, stream.count)


async def reach(streams: list[Stream], count: int) -> None:
    """Return when every stream has `count` tokens."""
    await asyncio.gather(*(stream.reaches(count) for stream in streams))


async def test_a_killed_decode_workers_streams_go_on(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    streams, outputs = begin(client, [prompt(i, 60 + 97 * i) for i in range(4)], 240)
    await reach(streams, 30)
    victim = cluster.signal("decode-0", signal.SIGKILL)
    await check(reference, streams, await outputs)
    await cluster.replaced("decode-0", victim)
    await cluster.settled()


async def test_both_decode_workers_are_killed_in_turn(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    """The second falls while the first is still starting: for a while there is none."""
    streams, outputs = begin(client, [prompt(10 + i, 40 + 61 * i) for i in range(4)], 240)
    await reach(streams, 30)
    first = cluster.signal("decode-0", signal.SIGKILL)
    await reach(streams, 90)
    second = cluster.signal("decode-1", signal.SIGKILL)
    await check(reference, streams, await outputs)
    await cluster.replaced("decode-0", first)
    await cluster.replaced("decode-1", second)
    await cluster.settled()


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_prompt_resumes_behind_what_all_stages_delivered(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient, stage: int
) -> None:
    await _until_idle(cluster)
    victim = f"prefill-0-{stage}"
    before = [len(cuts) for cuts in cluster.cuts()]
    prompts = [prompt(20 + 2 * stage + i, LONG) for i in range(2)]
    streams, outputs = begin(client, prompts, 24)
    await _stop_in_the_middle(cluster, victim)
    pid = cluster.signal(victim, signal.SIGKILL)
    await check(reference, streams, await outputs)
    await cluster.replaced(victim, pid)
    new = [token for cuts, old in zip(cluster.cuts(), before, strict=True) for token in cuts[old:]]
    assert max(new) >= 256, "a prompt was cut in its middle"
    # The successor has no KV of its own: what it did not compute it read from a decode worker.
    assert (await cluster.worker(victim))["kv_bytes_read"] > 0
    assert (await cluster.worker(victim))["tokens"] <= 2 * LONG - 256
    await cluster.settled()


async def _stop_in_the_middle(cluster: Cluster, victim: str) -> None:
    """Stop a stage when a prompt is delivered in part, and far from its end.

    What is seen of a running one is over by the time of a signal. Behind a stopped one only what it
    has handed on still arrives.
    """

    async def check() -> bool:
        cluster.signal(victim, signal.SIGSTOP)
        states = [await cluster.worker(f"decode-{i}") for i in range(2)]
        delivered = [grant["delivered"] for state in states for grant in state["arriving"]]
        if any(512 <= tokens <= LONG - 3000 for tokens in delivered):
            return True
        cluster.signal(victim, signal.SIGCONT)
        return False

    await eventually(check, "a prompt to be delivered in part")


async def _until_idle(cluster: Cluster) -> None:
    """Return when no canary or earlier request is in the pipeline."""

    async def check() -> bool:
        return not any([(await cluster.worker(f"prefill-0-{i}"))["busy"] for i in range(2)])

    await eventually(check, "the pipeline to be empty")


async def _until_computed(cluster: Cluster, tokens: int) -> None:
    async def check() -> bool:
        return bool((await cluster.worker("prefill-0-1"))["tokens"] >= tokens)

    await eventually(check, "the last stage to compute a part of the prompts")


async def test_a_stage_that_stands_still_for_ten_seconds(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    await _until_idle(cluster)
    computed = (await cluster.worker("prefill-0-1"))["tokens"]
    streams, outputs = begin(client, [prompt(30 + i, 4000) for i in range(2)], 24)
    await _until_computed(cluster, computed + 1000)
    stopped = time.monotonic()
    pid = cluster.signal("prefill-0-1", signal.SIGSTOP)
    try:

        async def noticed() -> bool:
            states = [await cluster.worker(f"decode-{i}") for i in range(2)]
            return not any(state["groups_ready"] for state in states)

        async def told() -> bool:
            return (await client.get("/ready")).status_code == 503

        await eventually(noticed, "the stopped stage to be noticed", seconds=8)
        # The router hears it from them, or from the leader: by one of the next messages.
        await eventually(told, "the router to have heard of it", seconds=2)
        await asyncio.sleep(10 - (time.monotonic() - stopped))
    finally:
        cluster.signal("prefill-0-1", signal.SIGCONT)
    await check(reference, streams, await outputs)
    await cluster.settled()
    assert cluster.pid("prefill-0-1") == pid, "it is the same process, which healed"


async def test_a_killed_routers_requests_are_freed_and_its_successor_knows_the_caches(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    known = [prompt(40 + i, 200) for i in range(8)]
    for tokens in known:
        assert await Stream(tokens, 8).read(client) == reference.greedy(tokens, 8)
    streams = [Stream(prompt(50 + i, 300), 2000) for i in range(4)]
    readers = [asyncio.create_task(stream.read(client)) for stream in streams]
    await reach(streams, 20)
    victim = cluster.signal("router-0", signal.SIGKILL)
    for reader in readers:
        with pytest.raises(httpx.TransportError):
            await reader

    async def freed() -> bool:
        states = [await cluster.worker(f"decode-{i}") for i in range(2)]
        return not any(state["busy"] or state["pages"]["resident"] for state in states)

    await eventually(freed, "the workers to free what nobody waits for", seconds=8)
    # The next request waits in the kernel until there is a router again.
    assert await Stream(known[0], 4).read(client) == reference.greedy(known[0], 4)
    await cluster.replaced("router-0", victim)
    await cluster.ready()
    for tokens in known:
        stream = Stream(tokens, 8)
        assert await stream.read(client) == reference.greedy(tokens, 8)
        assert stream.cached >= 192, "it was sent to the worker that has its blocks"
    await cluster.settled()
