from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_router import kubernetes_api, kubernetes_discovery
from penstock_router.discovery import Endpoint
from penstock_router.errors import ConfigurationError, KubernetesGarbage
from penstock_router.kubernetes_api import KubernetesApi, decode
from penstock_router.kubernetes_discovery import (
    KubernetesDiscovery,
    PodSet,
    Timing,
    UnusablePod,
    endpoint_of,
)
from penstock_wire.names import split_address
from tests.unit.router.fake_kubernetes import NAMESPACE, SERVICE, FakeKubernetes, pod, stage
from tests.unit.router.harness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

FAST = Timing(watch=30.0, pause=0.01, longest_pause=0.05)


class Follower:
    """A discovery that is being followed, and the names of each list that it told."""

    def __init__(self, discovery: KubernetesDiscovery) -> None:
        self.discovery = discovery
        self.lists: list[tuple[Endpoint, ...]] = []
        self._changed = asyncio.Event()

    @property
    def names(self) -> list[str]:
        return [endpoint.name for endpoint in self.lists[-1]] if self.lists else []

    async def run(self) -> None:
        async for found in self.discovery.watch():
            self.lists.append(found)
            self._changed.set()

    async def until(self, *names: str) -> None:
        """Wait until exactly these workers are told."""
        async with asyncio.timeout(10):
            while not self.lists or self.names != list(names):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def following(
    api: FakeKubernetes, timing: Timing = FAST, *, answer_seconds: float = 5.0
) -> AsyncIterator[Follower]:
    client = KubernetesApi(api.url, api.credentials, answer_seconds=answer_seconds)
    pods = PodSet.parse(f"{NAMESPACE}/{SERVICE}")
    follower = Follower(KubernetesDiscovery(client, pods, rng=random.Random(1), timing=timing))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        yield follower
        task.cancel()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes(tmp_path / "credentials").serving() as server:
        yield server


async def test_pods_are_listed_and_followed(api: FakeKubernetes) -> None:
    ends = pod("ended")
    ends["status"]["phase"] = "Failed"
    waits = pod("no-address")
    del waits["status"]["podIP"]
    revised = pod("d0", ip="10.0.0.1", **{"penstock.dev/revision": "r1"})
    api.put(revised, stage("g", 0, "10.0.0.2"), stage("g", 1, "fd00::3"), ends, waits)
    async with following(api) as follower:
        await follower.until("d0", "g-0", "g-1")
        assert follower.lists[-1] == (
            Endpoint(name="d0", role="decode", address="10.0.0.1:7000", revision="r1"),
            Endpoint(name="g-0", role="prefill", address="10.0.0.2:7000", group="g"),
            Endpoint(name="g-1", role="prefill", address="[fd00::3]:7000", group="g", stage=1),
        )
        api.put(pod("no-address", ip="10.0.0.4"))
        await follower.until("d0", "g-0", "g-1", "no-address")
        api.delete("d0")
        await follower.until("g-0", "g-1", "no-address")
        succeeded = stage("g", 1)
        succeeded["status"]["phase"] = "Succeeded"
        api.put(succeeded)
        await follower.until("g-0", "no-address")
    assert api.asked["list"] == 1


async def test_long_lists_come_in_pages(api: FakeKubernetes) -> None:
    api.page = 2
    names = [f"d{number}" for number in range(5)]
    api.put(*map(pod, names))
    async with following(api) as follower:
        await follower.until(*names)
    assert api.asked["list"] == 3


async def test_a_terminating_pod_stays_until_it_is_gone(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        leaving = pod("d0")
        leaving["metadata"]["deletionTimestamp"] = "2020-01-01T00:00:00Z"
        api.put(leaving, pod("d1"))
        await follower.until("d0", "d1")
        api.delete("d0")
        await follower.until("d1")


async def test_a_cut_connection_goes_on_where_it_was(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.put(pod("d1"))
        await follower.until("d0", "d1")
        api.cut()
        await api.until("watch", 2)
        api.delete("d0")
        await follower.until("d1")
    assert api.asked["list"] == 1, "the version of the last event was enough"


async def test_bookmarks_keep_the_version_young(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.bookmark()
        api.put(pod("d1"))
        await follower.until("d0", "d1")
        api.bookmark()
        api.put(pod("d2"))
        await follower.until("d0", "d1", "d2")
        api.oldest = api.version
        api.cut()
        await api.until("watch", 2)
    assert api.asked["410"] == 0


@pytest.mark.parametrize("in_stream", [True, False])
async def test_after_410_everything_is_listed_again(api: FakeKubernetes, in_stream: bool) -> None:
    """Nothing tells of what was deleted in between: only the new list does."""
    api.put(pod("d0"), pod("d1"))
    async with following(api) as follower:
        await follower.until("d0", "d1")
        await api.until("watch", 1)
        del api.pods["d0"]
        if in_stream:
            api.say(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}')
        else:
            api.oldest = 10**6
            api.cut()
            await api.until("410")
            api.oldest = 0
        await follower.until("d1")
        assert not follower.discovery.problem
    assert api.asked["list"] >= 2


async def test_a_watch_that_died_silently_is_noticed(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_discovery, "_GRACE_SECONDS", 0.05)
    api.put(pod("d0"))
    api.silent = True
    async with following(api, Timing(watch=0.05, pause=0.01, longest_pause=0.05)) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.put(pod("d1"))
        api.silent = False
        await follower.until("d0", "d1")
    assert api.asked["list"] == 1


def test_a_dead_connection_is_noticed_within_a_minute() -> None:
    timing = Timing()
    noticed = timing.watch + kubernetes_discovery._GRACE_SECONDS
    assert noticed + kubernetes_api.ANSWER_SECONDS <= 60


async def test_watches_that_end_at_once_are_not_made_in_a_loop(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    timing = Timing(watch=30.0, pause=60.0, longest_pause=60.0)
    async with following(api, timing) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.cut()
        for _ in range(20):
            await asyncio.sleep(0)
    assert api.asked["watch"] == 1


async def test_a_rotated_token_is_read_again(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.token = "second"
        api.cut()
        await api.until("401", 2)  # the old one is still mounted; workers stay
        assert follower.names == ["d0"]
        api.mount_token("second")
        api.put(pod("d1"))
        await follower.until("d0", "d1")


async def test_an_outage_keeps_the_list_and_is_told_once(
    api: FakeKubernetes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="penstock_router")
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.refuse = 503
        api.cut()
        await api.until("503", 4)
        assert follower.names == ["d0"]
        assert "refused with 503: told to refuse" in follower.discovery.problem
        api.refuse = 0
        api.put(pod("d1"))
        await follower.until("d0", "d1")
        assert not follower.discovery.problem
    told = [record.getMessage() for record in caplog.records]
    assert sum("workers stay as they were" in each for each in told) == 1
    assert sum("answers again" in each for each in told) == 1


async def test_rights_that_are_missing_are_named(api: FakeKubernetes) -> None:
    api.refuse = 403
    async with following(api) as follower:
        await api.until("403", 2)
        assert follower.lists == [], "nothing is known, so nothing is told"
        assert f"/namespaces/{NAMESPACE}/pods was refused with 403" in follower.discovery.problem


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b'{"kind":"PodList","metadata":{}}',
        b'{"kind":"PodList","metadata":{"resourceVersion":""},"items":[]}',
        b'{"kind":"PodList","metadata":{"resourceVersion":"1"},"items":[{"metadata":7}]}',
        b'{"kind":"NodeList","metadata":{"resourceVersion":"1"},"items":[]}',
        b"[" * 5000,
        b"\xff\xfe",
    ],
)
async def test_garbage_is_no_empty_list(api: FakeKubernetes, garbage: bytes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.raw_list = garbage or b" "
        api.say(b"not an event")
        await api.until("list", 3)
        assert follower.names == ["d0"]
        assert follower.discovery.problem
        api.raw_list = None
        api.put(pod("d1"))
        await follower.until("d0", "d1")


async def test_events_without_fields_are_survived(api: FakeKubernetes) -> None:
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        for line in (
            b'{"type":"MODIFIED","object":{"metadata":{"name":null,"labels":null}}}',
            b'{"type":"DELETED","object":{"metadata":{}}}',
            b'{"type":"SURPRISE","object":{"metadata":{"name":"d0"}}}',
            b'{"type":"ADDED","object":{"metadata":{"name":"x"},"status":null}}',
            b"",
        ):
            api.say(line)
        api.put(pod("d1"))
        await follower.until("d0", "d1")
    assert api.asked["list"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["metadata"]["labels"].pop("penstock.dev/group"),
        lambda found: found["metadata"]["labels"].update({"apps.kubernetes.io/pod-index": "-1"}),
        lambda found: found["metadata"]["labels"].update({"penstock.dev/group": "g" * 300}),
        lambda found: found["status"].update({"podIP": "x" * 300}),
    ],
)
async def test_one_unusable_pod_does_not_hide_the_others(
    api: FakeKubernetes, change: Callable[[dict[str, Any]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    wrong = stage("g", 0)
    change(wrong)
    api.put(wrong, pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        api.put(wrong, pod("d1"))
        await follower.until("d0", "d1")
    told = [record for record in caplog.records if "g-0 is left out" in record.getMessage()]
    assert len(told) == 1


async def test_answers_that_are_too_large_are_refused(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "_MOST_ANSWER_BYTES", 5000)
    monkeypatch.setattr(kubernetes_api, "_MOST_LINE_BYTES", 1000)
    api.put(pod("d0"))
    async with following(api) as follower:
        await follower.until("d0")
        await api.until("watch", 1)
        api.put(*(pod(f"more-{number}") for number in range(20)))
        api.say(b"x" * 200_000)
        await api.until("list", 2)
        await eventually(lambda: "over 5000 bytes" in follower.discovery.problem)


async def test_an_answer_that_does_not_come_ends(api: FakeKubernetes) -> None:
    api.mute = True
    async with following(api, answer_seconds=0.05) as follower:
        await eventually(lambda: bool(follower.discovery.problem))
    assert "was not answered within 0.05 s" in follower.discovery.problem


def test_a_pod_without_a_token_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="automountServiceAccountToken"):
        KubernetesApi("https://127.0.0.1:1", tmp_path)
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(ConfigurationError, match="holds no token"):
        KubernetesApi("https://127.0.0.1:1", tmp_path)


async def test_a_ca_that_is_not_there_is_named(api: FakeKubernetes) -> None:
    api.url = api.url.replace("http:", "https:")
    async with following(api) as follower:
        await eventually(lambda: bool(follower.discovery.problem))
    assert "ca.crt, is unusable" in follower.discovery.problem


@pytest.mark.parametrize("wrong", ["", "x", "x/", "/a=b", "X/a=b", "x/a=b c", "x/a=b,c in (d)"])
def test_malformed_pod_sets_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="NAMESPACE"):
        PodSet.parse(wrong)


_SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
_LABELS = st.dictionaries(
    st.sampled_from(
        [
            "penstock.dev/role",
            "penstock.dev/group",
            "penstock.dev/revision",
            "apps.kubernetes.io/pod-index",
        ]
    ),
    st.sampled_from(["decode", "prefill", "router", "", "0", "7", "-1", "9" * 5000, "\u0663", "g"]),
)
_PODS = st.fixed_dictionaries(
    {},
    optional={
        "metadata": _SCALARS
        | st.fixed_dictionaries(
            {},
            optional={"name": _SCALARS, "labels": _SCALARS | _LABELS, "resourceVersion": _SCALARS},
        ),
        "status": _SCALARS
        | st.fixed_dictionaries({}, optional={"podIP": _SCALARS, "phase": _SCALARS}),
    },
)


@given(_PODS | _SCALARS)
def test_whatever_a_pod_looks_like_it_is_an_endpoint_or_it_is_not(pod: object) -> None:
    try:
        found = endpoint_of(decode(json.dumps(pod).encode(), kubernetes_discovery._Pod, "a pod"))
    except (KubernetesGarbage, UnusablePod):
        return
    if found is not None:
        assert msgspec.convert(msgspec.to_builtins(found), Endpoint) == found
        assert split_address(found.address)[1] == kubernetes_discovery.CONTROL_PORT
        assert bool(found.group) == (found.role == "prefill")


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))), st.data())
async def test_lines_are_whole_however_they_arrive(whole: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(line + b"\n" for line in whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=10)))
    pieces = [sent[a:b] for a, b in itertools.pairwise([0, *cuts, len(sent)])]

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    request = httpx.Request("GET", "http://api/")
    response = httpx.Response(200, content=body(), request=request)
    until = asyncio.get_running_loop().time() + 10
    found = [line async for line in kubernetes_api.lines(response, until=until)]
    assert found == [line for line in whole if line]
