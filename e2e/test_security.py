"""Who may speak to whom. This cluster has no policy engine, so what refuses here is CURVE."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from e2e.images.build import name as image_name

if TYPE_CHECKING:
    from e2e.service import Service, Services

# Connects with the key pair in the folder given, if any, and waits for the handshake's outcome.
_PEER = """
import sys, zmq
from zmq.utils.monitor import recv_monitor_message
address, folder = sys.argv[1], sys.argv[2]
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
if folder != "-":
    from pathlib import Path
    from penstock_wire.keys import Keys
    keys = Keys.load(Path(folder))
    socket.curve_serverkey = keys.public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
monitor = socket.get_monitor_socket(
    zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED)
socket.connect(f"tcp://{address}")
if monitor.poll(15000):
    event = recv_monitor_message(monitor)["event"]
    print("accepted" if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else "refused")
else:
    print("silence")
"""


@pytest.fixture(scope="module")
def pair(services: Services) -> tuple[Service, Service]:
    """Two services in one namespace."""
    one = services.create("security", name="one")
    two = services.add(one.namespace, "two")
    for service in (one, two):
        del service.spec["prefill"]
        service.spec["decode"]["replicas"] = 1
        service.apply()
    for service in (one, two):
        service.wait_for("Ready")
    return one, two


def speak(service: Service, to: str, *, keys: str | None) -> str:
    """Return what becomes of a handshake from a new pod with this Secret to an address."""
    folder = "/keys" if keys else "-"
    container: dict[str, Any] = {
        "name": "peer",
        "image": image_name("router"),
        "command": ["python3", "-c", _PEER, to, folder],
    }
    spec: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    if keys:
        container["volumeMounts"] = [{"name": "keys", "mountPath": folder}]
        spec["volumes"] = [{"name": "keys", "secret": {"secretName": keys}}]
    name = f"peer-{keys or 'nobody'}"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": service.namespace},
        "spec": spec,
    }
    service.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    service.run("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{name}", "--timeout=90s")
    said = service.run("logs", name).strip()
    service.run("delete", "pod", name, "--grace-period=0", "--force")
    return said


@pytest.mark.parametrize(
    ("keys", "outcome"), [("one-keys", "accepted"), ("two-keys", "refused"), (None, "refused")]
)
def test_workers_speak_only_to_their_own_service(
    pair: tuple[Service, Service], keys: str | None, outcome: str
) -> None:
    one, _ = pair
    [worker] = one.pods("decode")
    assert speak(one, f"{worker['status']['podIP']}:7000", keys=keys) == outcome


def test_keys_of_services_differ(pair: tuple[Service, Service]) -> None:
    one, two = pair
    data = [
        one.run("get", "secret", f"{s.name}-keys", "-o", "jsonpath={.data}") for s in (one, two)
    ]
    assert data[0] != data[1]


def test_workers_have_no_right_in_the_cluster(pair: tuple[Service, Service]) -> None:
    one, _ = pair
    for pod in one.pods("decode"):
        assert pod["spec"]["automountServiceAccountToken"] is False


def test_a_router_may_look_at_pods_and_nothing_else(pair: tuple[Service, Service]) -> None:
    one, _ = pair
    account = f"--as=system:serviceaccount:{one.namespace}:one-router"
    may = {
        verb: one.kubectl(
            "auth", "can-i", *verb.split(), account, "--namespace", one.namespace, check=False
        ).stdout.strip()
        for verb in ("list pods", "watch pods", "get secrets", "delete pods", "list services")
    }
    assert may == {
        "list pods": "yes",
        "watch pods": "yes",
        "get secrets": "no",
        "delete pods": "no",
        "list services": "no",
    }


def test_the_policy_lets_only_the_service_in(pair: tuple[Service, Service]) -> None:
    """What a policy engine would enforce beside the keys."""
    one, _ = pair
    [policy] = one.items("networkpolicies")
    assert policy["spec"]["podSelector"]["matchLabels"]["penstock.dev/service"] == "one"
    sources = [rule["from"] for rule in policy["spec"]["ingress"] if "from" in rule]
    assert sources == [[{"podSelector": {"matchLabels": {"penstock.dev/service": "one"}}}]]
