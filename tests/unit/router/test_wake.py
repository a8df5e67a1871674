"""Scale from zero: the router in the test's process, on a scaler in memory; and with real parts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from penstock_router import proxy as proxy_module
from penstock_router import wake
from penstock_router.errors import KubernetesError
from penstock_router.scaling import Scale
from penstock_wire.keys import Keys
from tests.unit.router.fake_kubernetes import NAMESPACE, SERVICE, FakeKubernetes, pod
from tests.unit.router.fake_worker import FakeCluster, decode_worker, prefill_worker
from tests.unit.router.harness import MODEL, Service, eventually, serving
from tests.unit.router.real_parts import Worker, router_process
from tests.unit.router.tiny_models import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ASK: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "seed": 1}


class FakeScales:
    """RoleScalers in memory."""

    def __init__(self, **replicas: int) -> None:
        self.replicas = {name.replace("_", "-"): number for name, number in replicas.items()}
        self.version = 1
        self.reads = 0
        self.writes: list[tuple[str, int]] = []
        self.failure: KubernetesError | None = None
        self.raced = False
        """The next write finds that somebody else wrote."""

    async def read(self, name: str) -> Scale:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return Scale(self.replicas[name], str(self.version))

    async def write(self, name: str, replicas: int, *, version: str) -> None:
        if self.raced:
            self.raced = False
            self.version += 1
            self.replicas[name] = 3
        if version != str(self.version):
            raise KubernetesError("modified", status=409)
        self.version += 1
        self.replicas[name] = replicas
        self.writes.append((name, replicas))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "_TICK_SECONDS", 0.005)
    monkeypatch.setattr(wake, "_WAKING_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(wake, "_ASLEEP_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(proxy_module, "_ASK_AGAIN_SECONDS", 0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def sleeping(*roles: str, **changes: Any) -> dict[str, Any]:
    """Settings with these roles allowed to sleep."""
    return {
        "discovery": f"kubernetes:{NAMESPACE}/{SERVICE}",
        "wake": tuple(f"{role}=chat-{role}" for role in roles),
        **changes,
    }


async def told(service: Service, path: str = "/ready") -> tuple[int, dict[str, Any]]:
    answer = await service.http.get(path)
    return answer.status_code, answer.json()


async def until_asleep(service: Service) -> None:
    await eventually(lambda: service.router.waker.asleep("decode"))


async def test_many_requests_wake_the_role_once(checkpoint: Path) -> None:
    worker, cluster, scales = decode_worker(), FakeCluster(), FakeScales(chat_decode=0)
    async with serving(cluster, checkpoint, scales=scales, **sleeping("decode")) as service:
        await until_asleep(service)
        status, body = await told(service)
        assert (status, body["ready"], body["waking"]) == (200, True, False)
        assert "scaled to zero: decode" in body["message"]
        assert (await told(service, "/accepting"))[0] == 200
        assert scales.writes == []

        requests = [
            asyncio.create_task(service.openai.completions.create(**ASK)) for _ in range(16)
        ]
        await eventually(lambda: service.router.proxy.waiting == 16 and bool(scales.writes))
        status, body = await told(service)
        assert (status, body["ready"], body["waking"], body["idle_seconds"]) == (
            503,
            False,
            True,
            0,
        )
        assert "decode was scaled to zero and is waking" in body["reasons"][0]
        assert (await told(service, "/accepting"))[0] == 200

        cluster.list(worker)
        answers = await asyncio.gather(*requests)
        assert len({answer.choices[0].text for answer in answers}) == 1
        assert scales.writes == [("chat-decode", 1)]
        await service.until_ready()
        status, body = await told(service)
        assert (status, body["waking"]) == (200, False)
        assert body["idle_seconds"] < 60
        text = (await service.http.get("/metrics")).text
        assert 'penstock_wakes_total{role="decode"} 1.0' in text

        reads = scales.reads
        await service.openai.completions.create(**ASK)
        assert scales.reads == reads, "the API is not asked while workers are there"


async def test_it_falls_asleep_again_and_is_woken_again(checkpoint: Path) -> None:
    worker, cluster, scales = decode_worker(), FakeCluster(), FakeScales(chat_decode=1)
    cluster.list(worker)
    async with serving(cluster, checkpoint, scales=scales, **sleeping("decode")) as service:
        await service.until_ready()
        for writes in (1, 2):
            scales.replicas["chat-decode"] = 0
            cluster.list()
            await until_asleep(service)
            request = asyncio.create_task(service.openai.completions.create(**ASK))
            await eventually(lambda n=writes: len(scales.writes) == n)  # type: ignore[misc]
            cluster.list(worker)
            assert (await request).choices[0].finish_reason == "length"


async def test_a_role_put_back_to_sleep_while_a_request_waits_is_woken_again(
    checkpoint: Path,
) -> None:
    worker, cluster, scales = decode_worker(), FakeCluster(), FakeScales(chat_decode=0)
    async with serving(cluster, checkpoint, scales=scales, **sleeping("decode")) as service:
        request = asyncio.create_task(service.openai.completions.create(**ASK))
        await eventually(lambda: len(scales.writes) == 1)
        scales.replicas["chat-decode"] = 0
        await eventually(lambda: len(scales.writes) == 2)
        cluster.list(worker)
        await request


async def test_what_another_router_did_is_not_undone(checkpoint: Path) -> None:
    worker, cluster, scales = decode_worker(), FakeCluster(), FakeScales(chat_decode=0)
    scales.raced = True
    async with serving(cluster, checkpoint, scales=scales, **sleeping("decode")) as service:
        request = asyncio.create_task(service.openai.completions.create(**ASK))
        await eventually(lambda: service.router.waker.waking("decode"))
        assert scales.replicas == {"chat-decode": 3}
        assert scales.writes == []
        cluster.list(worker)
        await request


async def test_a_request_is_held_longer_than_for_a_restart_but_not_for_ever(
    checkpoint: Path,
) -> None:
    scales = FakeScales(chat_decode=0)
    changes = sleeping("decode", worker_wait_seconds=0.01, wake_seconds=0.3)
    async with serving(FakeCluster(), checkpoint, scales=scales, **changes) as service:
        await until_asleep(service)
        started = asyncio.get_running_loop().time()
        with pytest.raises(openai.InternalServerError) as caught:
            await service.openai.completions.create(**ASK)
        assert asyncio.get_running_loop().time() - started >= 0.3
        assert caught.value.status_code == 503
        assert caught.value.code == "no_worker"


async def test_workers_that_are_there_and_fail_are_not_waited_for_as_if_they_slept(
    checkpoint: Path,
) -> None:
    worker, scales = decode_worker(), FakeScales(chat_decode=1)
    changes = sleeping("decode", worker_wait_seconds=0.05, wake_seconds=60.0)
    async with serving(FakeCluster(worker), checkpoint, scales=scales, **changes) as service:
        await service.until_ready()
        worker.kill()
        with pytest.raises(openai.InternalServerError):
            await asyncio.wait_for(service.openai.completions.create(**ASK), 10)
        assert scales.writes == []
        status, body = await told(service)
        assert (status, body["waking"]) == (503, False)
        assert (await told(service, "/accepting"))[0] == 200, "it holds requests for a restart"


async def test_prefill_is_woken_while_decode_answers_alone(checkpoint: Path) -> None:
    worker, cluster = decode_worker(), FakeCluster()
    scales = FakeScales(chat_prefill=0)
    cluster.list(worker)
    changes = sleeping("prefill", require_prefill=True, group_wait_seconds=0.01)
    async with serving(cluster, checkpoint, scales=scales, **changes) as service:
        await eventually(lambda: service.router.waker.asleep("prefill"))
        await service.until_ready()
        assert "scaled to zero: prefill" in (await told(service))[1]["message"]
        await service.openai.completions.create(**ASK)
        await eventually(lambda: scales.writes == [("chat-prefill", 1)])
        assert (await told(service))[0] == 200, "decode workers answer alone meanwhile"
        group = prefill_worker()
        cluster.list(worker, group)
        await eventually(lambda: bool(service.router.fleet.prefill_groups()))
        assert (await told(service))[1]["waking"] is False


async def test_a_scaler_that_cannot_be_read_is_a_reason(checkpoint: Path) -> None:
    scales = FakeScales(chat_decode=0)
    scales.failure = KubernetesError("GET scale was refused with 403: no", status=403)
    async with serving(FakeCluster(), checkpoint, scales=scales, **sleeping("decode")) as service:
        await eventually(lambda: bool(service.router.waker.problem("decode")))
        status, body = await told(service)
        assert status == 503
        assert "is not known: GET scale was refused with 403" in body["message"]
        assert (await told(service, "/accepting"))[0] == 503
        scales.failure = None
        await until_asleep(service)
        assert (await told(service))[0] == 200


async def test_accepting_outlives_a_crash_but_not_the_drain(checkpoint: Path) -> None:
    worker = decode_worker()
    worker.gate.clear()
    async with serving(FakeCluster(), checkpoint) as service:
        assert (await told(service, "/accepting"))[0] == 503
    cluster = FakeCluster(worker)
    async with serving(cluster, checkpoint) as service:
        await service.until_ready()
        assert (await told(service, "/accepting")) == (200, {"accepting": True})
        worker.kill()
        await eventually(lambda: bool(service.router.readiness.reasons()))
        assert (await told(service, "/accepting"))[0] == 200
        service.router.readiness.draining = True
        assert (await told(service, "/accepting"))[0] == 503


async def test_idle_seconds_count_from_the_last_answer(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        proxy = service.router.proxy
        before = proxy.idle_seconds()
        assert before > 0
        await asyncio.sleep(0.01)
        assert proxy.idle_seconds() > before
        worker.pause_at = 2
        request = asyncio.create_task(service.openai.completions.create(**ASK))
        await asyncio.wait_for(worker.paused.wait(), 10)
        assert (await told(service))[1]["idle_seconds"] == 0
        worker.gate.set()
        asked = asyncio.get_running_loop().time()
        await request
        assert proxy.idle_seconds() <= asyncio.get_running_loop().time() - asked


async def test_a_process_wakes_a_real_worker_through_the_api(tmp_path: Path) -> None:
    """Real processes and sockets: the API, the router, and a worker that comes when woken."""
    keys = Keys.generate()
    keys.save(tmp_path / "keys")
    host = "127.83.79.11"
    worker = Worker(keys, f"{host}:7000")
    body = {"model": "tiny", "prompt": "hello", "stream": True, "max_tokens": 8}
    async with FakeKubernetes(tmp_path / "credentials").serving() as api:
        api.scales["chat-decode"] = 0
        flags = (
            *("--discovery", f"kubernetes:{NAMESPACE}/{SERVICE}", "--wake", "decode=chat-decode"),
            *("--kubernetes-api", api.url, "--kubernetes-credentials", str(api.credentials)),
            *("--keepalive-seconds", "0.2"),
        )
        async with (
            asyncio.timeout(60),
            router_process(tmp_path, *flags) as (_, url),
            httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http,
        ):
            await until_status(http, "/ready", 200)
            assert "scaled to zero" in (await http.get("/ready")).json()["message"]
            assert (await http.get("/accepting")).status_code == 200
            async with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert await anext(lines) == ": keep-alive"
                await api.until("PATCH")
                assert (await http.get("/ready")).json()["waking"] is True
                await worker.server.start()
                try:
                    api.put(pod("d0", ip=host))
                    await worker.step_once_asked()
                    worker.step(finish=True)
                    rest = [line async for line in lines if line.startswith("data: ")]
                    assert rest[-1] == "data: [DONE]"
                    await until_status(http, "/ready", 200)
                finally:
                    await worker.server.close()
        assert api.patches == [{"name": "chat-decode", "replicas": 1}]
        assert api.asked["list"] == 1


async def until_status(http: httpx.AsyncClient, path: str, status: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if (await http.get(path)).status_code == status:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
