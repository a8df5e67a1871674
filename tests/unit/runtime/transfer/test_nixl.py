"""The NIXL data path where no network is needed: settings, the thread, a missing package."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING, cast

import pytest

from penstock_runtime.transfer.base import AgentClosed, Region, TransferError
from penstock_runtime.transfer.nixl import NixlThread, NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings, NixlSettingsError

if TYPE_CHECKING:
    from penstock_runtime.transfer.nixl_endpoint import Endpoint


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the environment back after settings were applied."""
    for name in NixlSettings(devices="lo").ucx_environment():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "transports", ["all", "tcp,cma", "sm", "shm,tcp", "tcp,cuda_ipc", "tcp,cuda", ""]
)
def test_transports_that_defy_a_fence_are_refused(transports: str) -> None:
    with pytest.raises(NixlSettingsError, match="past a fence"):
        NixlSettings(transports=transports)


def test_a_poll_without_a_nap_is_refused() -> None:
    with pytest.raises(NixlSettingsError, match="nap_idle_seconds"):
        NixlSettings(nap_idle_seconds=0)


def test_settings_reach_ucx() -> None:
    NixlSettings(devices="lo", peer_silence_seconds=1.5).apply()
    assert os.environ["UCX_TLS"] == "tcp"
    assert os.environ["UCX_NET_DEVICES"] == "lo"
    assert os.environ["UCX_TCP_USER_TIMEOUT"] == "1500ms"
    assert "UCX_NET_DEVICES" not in NixlSettings().ucx_environment()


def test_a_fixed_port_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TCP_PORT_RANGE", "9000-9010")
    with pytest.raises(NixlSettingsError, match="ephemeral"):
        NixlSettings().apply()


async def test_without_the_package_the_error_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    transfer = NixlTransfer()
    with pytest.raises(TransferError, match="install penstock's `runtime` extra"):
        await transfer.open("agent/1", [Region(0, 1)], lambda _: None)
    await transfer.close()
    await transfer.close()


class FakeEndpoint:
    """Stands where an Endpoint would: counts its ends, and fails when told."""

    busy = False

    def __init__(self, event_sets: frozenset[int] = frozenset()) -> None:
        self.event_sets = event_sets
        self.ends = 0
        self.broken = threading.Event()
        self.polled = threading.Event()

    def progress(self) -> list[bytes]:
        self.polled.set()
        if self.broken.is_set():
            raise RuntimeError("a defect")
        return []

    def destroy(self) -> None:
        self.ends += 1


async def polled_endpoint(thread: NixlThread) -> FakeEndpoint:
    endpoint = FakeEndpoint()
    await thread.call(lambda: thread.add(cast("Endpoint", endpoint), lambda _: None))
    assert await asyncio.to_thread(endpoint.polled.wait, 10)
    return endpoint


async def test_the_thread_returns_results_and_raises_errors() -> None:
    thread = NixlThread(NixlSettings(), asyncio.get_running_loop())
    assert await thread.call(lambda: threading.current_thread().name) == "nixl"
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)
    assert await thread.call(lambda: 5) == 5
    await thread.close()


async def test_closing_ends_every_agent_and_refuses_what_comes_later() -> None:
    thread = NixlThread(NixlSettings(), asyncio.get_running_loop())
    endpoint = await polled_endpoint(thread)
    await thread.close()
    assert endpoint.ends == 1
    with pytest.raises(AgentClosed, match="it was closed"):
        await thread.call(lambda: None)


async def test_a_thread_that_is_closed_ends_whatever_it_was_doing() -> None:
    """The command that wakes it may be run with the one before: then nothing wakes it any more."""
    for _ in range(100):
        thread = NixlThread(NixlSettings(), asyncio.get_running_loop())
        await thread.call(lambda: None)
        async with asyncio.timeout(10):
            await thread.close()


async def test_sockets_and_commands_wake_a_thread_that_has_nothing_to_do() -> None:
    settings = NixlSettings(nap_watched_seconds=60.0, linger_seconds=60.0)
    thread = NixlThread(settings, asyncio.get_running_loop())
    here, there = socket.socketpair()
    with here, there, select.epoll() as event_set:
        event_set.register(there, select.EPOLLIN)
        endpoint = FakeEndpoint(frozenset({event_set.fileno()}))
        async with asyncio.timeout(10):
            await thread.call(lambda: thread.add(cast("Endpoint", endpoint), lambda _: None))
            for _ in range(3):
                # Behind a command it polls, and then it waits.
                assert await asyncio.to_thread(endpoint.polled.wait, 10)
                endpoint.polled.clear()
                here.send(b"x")
                assert await asyncio.to_thread(endpoint.polled.wait, 10)
                there.recv(1)
                endpoint.polled.clear()
                await thread.call(lambda: None)
            await thread.close()
    assert endpoint.ends == 1


async def test_a_failure_of_the_thread_ends_its_agents_and_reaches_every_waiter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread = NixlThread(NixlSettings(), asyncio.get_running_loop())
    endpoint = await polled_endpoint(thread)
    waiting = thread.future()
    endpoint.broken.set()
    with pytest.raises(AgentClosed, match="a defect"):
        await asyncio.wait_for(waiting, 10)
    assert endpoint.ends == 1
    assert "the NIXL thread failed" in caplog.text
    with pytest.raises(AgentClosed, match="a defect"):
        await thread.call(lambda: None)
    await thread.close()
