"""Settings, logs, health over HTTP, rights, requests on the wire."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio import client

from penstock_operator.cluster import kinds, logs, rbac
from penstock_operator.cluster.connect import KubeTransport, connection_info
from penstock_operator.cluster.health import Health, serving
from penstock_operator.cluster.kube import Kube
from penstock_operator.cluster.metrics import Metrics
from penstock_operator.cluster.settings import Settings, identity, parse
from penstock_operator.errors import (
    ApiConflict,
    ApiMissing,
    ApiRefused,
    ApiUnavailable,
    SettingsError,
)
from tests.unit.operator_cluster.world import Lease, World

if TYPE_CHECKING:
    from pathlib import Path

# --- settings -----------------------------------------------------------------------------------


def test_a_command_line_makes_settings() -> None:
    assert parse([]) == Settings()
    found = parse(["--namespaces", "a, b", "--workers", "3", "--log-format", "text"])
    assert (found.namespaces, found.workers, found.log_format) == (("a", "b"), 3, "text")
    assert parse(["--http", "[::1]:9"]).http_address() == ("::1", 9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "0"], "--workers"),
        (["--renew-deadline-seconds", "15"], "must be below --lease-seconds 15"),
        (["--lease-retry-seconds", "10"], "--lease-retry-seconds"),
        (["--resync-seconds", "0"], "--resync-seconds"),
        (["--log-format", "xml"], "'xml' is neither json nor text"),
        (["--log-level", "loud"], "--log-level"),
        (["--http", "8080"], "is not HOST:PORT"),
    ],
)
def test_impossible_settings_are_refused_by_their_flag(arguments: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        parse(arguments)


def test_no_two_processes_have_one_identity() -> None:
    assert identity() != identity()


def test_the_help_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--lease-seconds" in text
    assert "Default: 15.0." in text


# --- logs ---------------------------------------------------------------------------------------


def test_a_log_line_is_one_json_object_that_names_the_service() -> None:
    record = logging.LogRecord("penstock", logging.WARNING, "f", 1, "two\nlines %d", (3,), None)
    token = logs.SERVICE.set("default/chat")
    try:
        line = logs.JsonFormatter().format(record)
        assert "[default/chat]" in logs.TextFormatter().format(record)
    finally:
        logs.SERVICE.reset(token)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "two\nlines 3"
    assert (found["level"], found["service"]) == ("warning", "default/chat")


# --- rights -------------------------------------------------------------------------------------


async def test_every_call_is_allowed_and_every_right_is_used() -> None:
    """The fake API refuses what the rules do not allow; what nothing used is too much."""
    spec: Any = {"autoscaling": {"minReplicas": 0, "maxReplicas": 3, "idleSeconds": 10}}
    world = World()
    await world.watches.prime()
    world.apply(decode=spec, prefill={"pipelineParallel": 2})
    world.broken = lambda pod: {"phase": "Pending"} if "decode" in pod["metadata"]["name"] else None
    await world.run(4)  # waits for volumes: events are listed
    world.broken = lambda pod: None
    await world.settle()
    scaler = ("rolescalers", "default", "chat-decode")
    for number in (3, 1):
        world.api.change(scaler, lambda obj, n=number: obj["spec"].update(replicas=n))  # type: ignore[misc]
        await world.settle()
    world.idle = 100.0
    await world.settle()
    world.apply(decode={"replicas": 1})
    await world.settle()
    assert not world.failures

    used = set(world.api.calls)
    used |= {("watch", kind.plural) for kind in (*kinds.WATCHED, kinds.SERVICE)}
    granted = {
        (verb, resource)
        for rule in rbac.CLUSTER_RULES
        for resource in rule.resources
        for verb in rule.verbs
    }
    for_others = {
        ("get", "pods"),  # held to be granted to routers
        ("get", "rolescalers/scale"),
    }
    deletable = {("delete", kind.plural) for kind in (*kinds.SHARED,)}  # pruned when not wanted
    assert used <= granted
    assert granted - used <= for_others | deletable


def test_what_routers_are_granted_is_held() -> None:
    for verb in ("get", "list", "watch"):
        assert rbac.allows(rbac.CLUSTER_RULES, group="", resource="pods", verb=verb)
    for verb in ("get", "patch"):
        assert rbac.allows(
            rbac.CLUSTER_RULES, group="penstock.dev", resource="rolescalers/scale", verb=verb
        )
    assert not any("*" in (*rule.resources, *rule.verbs) for rule in rbac.CLUSTER_RULES)
    secrets = [rule.verbs for rule in rbac.CLUSTER_RULES if "secrets" in rule.resources]
    assert secrets == [("create",)]


# --- health -------------------------------------------------------------------------------------


@dataclass
class Leadership:
    held: bool = True
    answering: bool = True


@dataclass
class Queue:
    stuck: bool = False


async def test_health_and_metrics_over_http() -> None:
    metrics = Metrics()
    health = Health(Leadership(), queue=Queue(), primed=True)
    async with (
        serving(health, metrics, ("127.0.0.1", 0)) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):

        async def status(path: str) -> int:
            async with session.get(path) as response:
                return response.status

        assert [await status(path) for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        health.queue = Queue(stuck=True)
        assert (await status("/healthz"), await status("/readyz")) == (503, 200)
        health.queue = None
        for leadership, primed, expected in (
            (Leadership(held=False), False, 200),  # a standby that could take over
            (Leadership(held=False, answering=False), False, 503),
            (Leadership(held=True), False, 503),
        ):
            health.leadership, health.primed = leadership, primed
            assert await status("/readyz") == expected
        async with session.get("/metrics") as response:
            text = await response.text()
        for name in ("queue_age_seconds", "last_success_timestamp_seconds", "leader"):
            assert f"penstock_operator_{name}" in text


async def test_an_address_that_is_taken_is_told() -> None:
    async with serving(Health(Leadership()), Metrics(), ("127.0.0.1", 0)) as port:
        with pytest.raises(SettingsError, match="cannot listen on"):
            async with serving(Health(Leadership()), Metrics(), ("127.0.0.1", port)):
                pass


# --- the wire -----------------------------------------------------------------------------------


@pytest.fixture
async def server() -> Any:
    """An API server that answers by the name of what is asked for."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        await request.read()
        name = request.path.rpartition("/")[2]
        if name == "broken":
            return web.Response(status=502, text="<html>bad gateway</html>")
        if name.isdigit():
            return web.json_response({"message": "because"}, status=int(name))
        return web.json_response({"metadata": {"name": name}, "token": "x"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    configuration.api_key["BearerToken"] = "Bearer secret"
    yield configuration, seen
    await runner.cleanup()


async def test_requests_and_errors_on_the_wire(server: Any) -> None:
    configuration, seen = server
    metrics = Metrics()
    async with KubeTransport(configuration, metrics) as transport:
        kube = Kube(transport, Lease())
        found = await kube.get(kinds.POD, "default", "p")
        assert found is not None
        assert seen[0].headers["Authorization"] == "Bearer secret"
        assert await kube.get(kinds.POD, "default", "404") is None
        for name, error in (
            ("409", ApiConflict),
            ("422", ApiRefused),
            ("403", ApiRefused),
            ("429", ApiUnavailable),
            ("500", ApiUnavailable),
            ("404", ApiMissing),
        ):
            with pytest.raises(error, match="because"):
                await kube.merge(kinds.POD, "default", name, {"metadata": {}})
        with pytest.raises(ApiUnavailable, match="bad gateway"):
            await kube.get(kinds.POD, "default", "broken")
        obj = {"kind": "Pod", "metadata": {"name": "a", "namespace": "b"}}
        await kube.apply(obj, "status")
        assert seen[-1].path == "/api/v1/namespaces/b/pods/a/status"
        assert seen[-1].query == {"fieldManager": "penstock-operator", "force": "true"}
        assert seen[-1].content_type == "application/apply-patch+yaml"
    text = metrics.render().decode()
    assert 'api_calls_total{code="200",resource="pods/status",verb="PATCH"} 1.0' in text
    assert 'api_calls_total{code="404",resource="pods",verb="GET"} 1.0' in text


async def test_an_api_server_that_is_not_there_is_unavailable() -> None:
    configuration = client.Configuration(host="http://127.0.0.1:9")
    async with KubeTransport(configuration, Metrics()) as transport:
        with pytest.raises(ApiUnavailable, match="no answer within"):
            await Kube(transport, Lease()).get(kinds.POD, "default", "p")


async def test_kopf_gets_the_same_connection(server: Any, tmp_path: Path) -> None:
    configuration, _ = server
    configuration.ssl_ca_cert = str(tmp_path / "ca.crt")
    info = await connection_info(configuration)
    assert info.server == configuration.host
    assert (info.scheme, info.token) == ("Bearer", "secret")
    assert info.ca_path == str(tmp_path / "ca.crt")
