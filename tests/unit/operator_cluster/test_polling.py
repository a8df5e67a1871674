"""Answers over real HTTP: typed, bounded, and never a reason to fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from penstock_operator import labels
from penstock_operator.cluster import kinds
from penstock_operator.cluster.children import child_of
from penstock_operator.cluster.polling import Answers, Poller, RouterPod, worker_answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_operator.cluster.children import Child


def pod(role: str, address: str = "127.0.0.1", *, ready: bool = True) -> Child:
    state = {"name": "x", "ready": ready, "state": {"running": {}}, "lastState": {}}
    conditions = [{"type": "Ready", "status": "True"}] if ready else []
    return child_of(
        kinds.POD,
        {
            "metadata": {
                "name": f"chat-{role}",
                "uid": role,
                "labels": {labels.SERVICE: "chat", labels.ROLE: role},
            },
            "status": {
                "podIP": address,
                "conditions": conditions,
                "containerStatuses": [state],
            },
        },
    )


class Server:
    """Answers what a test says."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = self.answers.get(request.path)
        if answer == "hang":
            await asyncio.Event().wait()
        if isinstance(answer, bytes):
            return web.Response(body=answer)
        if answer == "redirect":
            raise web.HTTPFound("/elsewhere")
        status = 503 if isinstance(answer, dict) and answer.get("ready") is False else 200
        return web.json_response(answer, status=status)


@contextlib.asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, Poller]]:
    server = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    monkeypatch.setattr(labels, "HTTP_PORT", server.port)
    async with aiohttp.ClientSession() as session:
        yield server, Poller(session, seconds=0.5)
    await runner.cleanup()


async def test_routers_and_workers_are_asked_what_they_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch) as (server, poller):
        server.answers = {
            "/ready": {"ready": False, "reasons": ["no worker", "no group"], "idle_seconds": 7},
            "/state": {"transport": "tcp", "groups_ready": ["g"], "pages": {"resident": 3}},
            "/readyz": {"ready": False, "progress": 0.25, "message": "loading weights"},
        }
        pods = [pod("router"), pod("decode"), pod("prefill", ready=False)]
        told = await poller.ask(pods, Answers(), router_port=server.port, depth="everything")
        assert told.routers == (
            RouterPod(
                name="chat-router",
                ready=False,
                message="no worker; no group",
                idle_seconds=7.0,
                accepting=True,
            ),
        )
        assert told.workers["decode"].transport == "tcp"
        assert told.workers["decode"].groups_ready == frozenset({"g"})
        assert told.workers["decode"].load == 3
        assert told.workers["prefill"].progress == 0.25
        server.asked.clear()
        again = await poller.ask(pods, told, router_port=server.port, depth="routers")
        assert server.asked == ["/ready"]
        assert again.workers == told.workers
        assert not again.differ(told)


@pytest.mark.parametrize(
    "answer",
    [
        b"not json",
        b"[1, 2]",
        b'"text"',
        b"{" + b" " * 100_000 + b"}",
        b"[" * 60_000,
        "hang",
        "redirect",
    ],
)
async def test_an_answer_that_is_not_one_is_none(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(monkeypatch) as (server, poller):
        server.answers = {"/ready": answer, "/state": answer}
        pods = [pod("router"), pod("decode")]
        told = await poller.ask(pods, Answers(), router_port=server.port, depth="everything")
        assert told == Answers(silent_routers=1)
        assert told.idle_seconds == 0.0


async def test_a_router_that_does_not_answer_keeps_roles_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch) as (server, poller):
        server.answers = {"/ready": {"ready": True, "idle_seconds": 999.0}}
        answers = await poller.ask(
            [pod("router")], Answers(), router_port=server.port, depth="routers"
        )
        assert answers.idle_seconds == 999.0
        both = [pod("router"), pod("router", "127.0.0.2:1")]
        answers = await poller.ask(both, Answers(), router_port=server.port, depth="routers")
        assert (answers.silent_routers, answers.idle_seconds) == (1, 0.0)


def test_growing_idle_times_are_not_news() -> None:
    first, later = (
        Answers(routers=(RouterPod(name="r", ready=True, message="ok", idle_seconds=s),))
        for s in (1.0, 60.0)
    )
    assert not first.differ(later)
    assert first.differ(Answers())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
fields = ("progress", "message", "transport", "groups_ready", "pages", "running", "busy")


@given(st.dictionaries(st.sampled_from(fields), json_values))
def test_whatever_a_worker_says_has_the_right_types(said: dict[str, Any]) -> None:
    said = json.loads(json.dumps(said))
    told = worker_answer(said, said)
    assert 0.0 <= told.progress <= 1.0
    assert isinstance(told.message, str)
    assert isinstance(told.transport, str)
    assert isinstance(told.load, int)
    assert told.groups_ready is None or all(isinstance(g, str) for g in told.groups_ready)
