"""What wakes services, and what finds that a watch has missed something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_operator.cluster import kinds
from penstock_operator.cluster.health import Health
from penstock_operator.cluster.kube import Kube
from penstock_operator.cluster.resync import Resync
from penstock_operator.cluster.workqueue import Wake
from tests.unit.operator_cluster.world import World

if TYPE_CHECKING:
    import pytest

    from penstock_operator.cluster.transport import Request

KEY = ("default", "chat")


async def ready() -> World:
    world = World()
    await world.watches.prime()
    world.apply(decode={"replicas": 1})
    await world.settle()
    return world


def resync(world: World) -> Resync:
    return Resync(
        Kube(world.api, world.lease),
        world.children,
        world.watches,
        world.wakes,  # type: ignore[arg-type]
        world.metrics,
        seconds=300.0,
    )


async def test_priming_reads_everything_in_pages_and_wakes_every_service() -> None:
    world = World()
    for number in range(7):
        world.apply(f"s{number}")
    await world.operate()
    await world.settle()
    before = world.children
    await world.restart()
    assert set(world.wakes.waiting) == {("default", f"s{n}") for n in range(7)}
    assert {k: world.children.of(k) for k in before.services()} == {
        k: before.of(k) for k in before.services()
    }


async def test_priming_waits_for_an_api_without_the_crds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.apply()
    tries = 0

    def refuse(request: Request) -> tuple[int, str] | None:
        missing = "rolescalers" in request.path and tries < 2
        return (404, "the server could not find the requested resource") if missing else None

    async def no_wait(seconds: float) -> None:
        nonlocal tries
        tries += 1

    world.api.refuse = refuse
    monkeypatch.setattr("penstock_operator.cluster.watches.asyncio.sleep", no_wait)
    await world.watches.prime()
    assert tries == 2
    assert "are its CRDs installed?" in caplog.text
    assert KEY in world.wakes.waiting


async def test_the_writing_of_a_status_does_not_wake_its_service() -> None:
    world = await ready()
    world.api.change(
        ("inferenceservices", "default", "chat"),
        lambda obj: obj["status"].update(url="x"),
    )
    world.deliver()
    assert world.wakes.waiting == {}
    world.apply(decode={"replicas": 2})
    world.deliver()
    assert world.wakes.waiting == {KEY: Wake.CHANGE}


async def test_a_resync_forgets_what_was_deleted_unseen_and_says_nothing_is_dead() -> None:
    """A watch that lists again after 410 does not tell of deletions meanwhile."""
    world = await ready()
    pods = [pod["metadata"]["name"] for pod in world.api.of(kinds.POD)]
    for name in pods:
        world.api.remove(("pods", "default", name))
    world._delivered = len(world.api.events)
    looks = resync(world)
    await looks.once(grace=0.0)
    assert [kind for kind, _ in world.children.of(KEY) if kind == "Pod"] == []
    assert world.wakes.waiting[KEY] == Wake.CHANGE | Wake.FULL
    assert looks.dead == frozenset()
    await world.settle()
    assert world.verdict()[0] == "True"


async def test_a_watch_that_tells_nothing_is_found_out() -> None:
    world = await ready()
    world.api.change(
        ("services", "default", "chat-router"), lambda obj: obj["spec"].update(ports=[])
    )
    looks = resync(world)
    await looks.once(grace=0.0)
    assert looks.dead == {"services"}
    assert Health(world_leads(), comparison=looks).sick() == ["the watch of services is dead"]
    world.deliver()
    await looks.once(grace=0.0)
    assert looks.dead == frozenset()


async def test_a_watch_that_is_only_late_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await ready()
    world.api.change(
        ("services", "default", "chat-router"), lambda obj: obj["spec"].update(ports=[])
    )

    async def meanwhile(seconds: float) -> None:
        assert seconds == 120.0
        world.deliver()

    monkeypatch.setattr("penstock_operator.cluster.resync.asyncio.sleep", meanwhile)
    looks = resync(world)
    await looks.once(grace=120.0)
    assert looks.dead == frozenset()


async def test_services_that_the_watch_does_not_tell_of_are_reconciled_all_the_same() -> None:
    world = await ready()
    world.apply("unseen")
    world._delivered = len(world.api.events)
    looks = resync(world)
    await looks.once(grace=0.0)
    assert looks.dead == {"inferenceservices"}
    assert world.wakes.waiting["default", "unseen"] == Wake.FULL
    await world.operate()
    assert "unseen-router" in world.names(kinds.SHARED[0])


class world_leads:  # noqa: N801 - reads as a sentence
    held = True
    answering = True
