"""`penstock down` under requests: they end, and nothing is left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.faults.cluster import gone
from tests.integration.faults.streams import Stream, prompt

if TYPE_CHECKING:
    import httpx

    from tests.integration.faults.cluster import Cluster
    from tests.integration.faults.streams import Reference

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


async def test_running_requests_end_and_nothing_is_left(
    cluster: Cluster, reference: Reference, client: httpx.AsyncClient
) -> None:
    pods = cluster.pods()
    assert cluster.supervisor is not None
    streams = [Stream(prompt(300 + i, 100 + 200 * i), 200) for i in range(4)]
    outputs = asyncio.gather(*(stream.read(client) for stream in streams))
    await asyncio.gather(*(stream.reaches(10) for stream in streams))
    assert await asyncio.to_thread(cluster.down) == 0
    for stream, output in zip(streams, await outputs, strict=True):
        assert output == await asyncio.to_thread(reference.greedy, stream.prompt, stream.count)
    assert await asyncio.to_thread(cluster.supervisor.wait, 10) == 0
    left = [pod.name for pod in pods.values() if pod.pid is not None and not gone(pod.pid)]
    assert left == []
    ours = {("127.0.0.1", cluster.port)}
    for pod in pods.values():
        host = pod.http.partition(":")[0]
        ours |= {(host, 7000), (host, 7001)}
    open_now = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert not ours & {tuple(connection.laddr) for connection in open_now}
    for i in range(cluster.decodes):
        assert "drains" in cluster.log(f"decode-{i}")
