"""The cluster itself: what every other test takes for granted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from e2e.cluster.waiting import until
from e2e.images.build import PYTHON_IMAGE

if TYPE_CHECKING:
    from e2e.cluster.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl

pytestmark = pytest.mark.timeout(300)
_SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["NODE"].encode())
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""
_NODE = {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}


def one_pod_a_node() -> dict[str, Any]:
    """A DaemonSet whose pods say the name of their node."""
    labels = {"app": "echo"}
    container = {
        "name": "echo",
        "image": PYTHON_IMAGE,
        "command": ["python3", "-c", _SERVER],
        "env": [_NODE],
        "securityContext": {"runAsUser": 10001, "readOnlyRootFilesystem": True},
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "echo"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
            },
        },
    }


@pytest.fixture
def echo(kubectl: Kubectl, namespace: str) -> str:
    """The namespace of a Service with one pod a node."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "echo"},
        "spec": {"selector": {"app": "echo"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    objects = {"apiVersion": "v1", "kind": "List", "items": [one_pod_a_node(), service]}
    kubectl("apply", "--namespace", namespace, "-f", "-", stdin=json.dumps(objects))
    kubectl("rollout", "status", "daemonset/echo", "--namespace", namespace, "--timeout=90s")
    return namespace


def ask(url: str) -> str:
    try:
        return httpx.get(url, timeout=2, trust_env=False).text
    except httpx.TransportError as error:
        raise AssertionError(f"{url}: {error!r}") from error


def test_a_service_is_balanced_over_pods_on_all_nodes(
    cluster: Cluster, kubectl: Kubectl, echo: str
) -> None:
    address = kubectl.get("service", "echo", "--namespace", echo)["spec"]["clusterIP"]
    wanted = set(cluster.settings.node_names)
    answered: set[str] = set()

    def all_have_answered() -> bool:
        answered.add(ask(f"http://{address}"))
        assert answered == wanted, f"only {sorted(answered)} have answered"
        return True

    until("every node has answered", all_have_answered, seconds=30, every=0)


def test_pods_find_and_reach_each_other_by_name(
    cluster: Cluster, kubectl: Kubectl, echo: str
) -> None:
    program = f"import urllib.request as r; print(r.urlopen('http://echo.{echo}.svc').read())"
    pods = kubectl.get("pods", "--namespace", echo, "--selector", "app=echo")["items"]
    assert {pod["spec"]["nodeName"] for pod in pods} == set(cluster.settings.node_names)
    for pod in pods:
        name = pod["metadata"]["name"]
        command = ("exec", name, "--namespace", echo, "--", "python3", "-c", program)
        assert "node" in kubectl(*command).stdout


def test_a_cut_node_is_noticed_and_heals(cluster: Cluster, echo: str, kubectl: Kubectl) -> None:
    last = cluster.settings.node_names[-1]
    cluster.network.cut(last)
    try:
        cluster.wait_for_node(last, ready=False, seconds=90)
        address = kubectl.get("service", "echo", "--namespace", echo)["spec"]["clusterIP"]
        until(
            "only the other nodes answer",
            lambda: last not in {ask(f"http://{address}") for _ in range(10)},
            seconds=30,
        )
    finally:
        cluster.network.heal(last)
    cluster.wait_for_node(last, seconds=90)


def test_a_node_boots_again_after_a_power_cut(
    cluster: Cluster, kubectl: Kubectl, echo: str
) -> None:
    node = cluster.nodes[cluster.settings.node_names[-1]]
    node.power_off()
    cluster.wait_for_node(node.name, ready=False, seconds=90)
    node.start()
    cluster.wait_for_node(node.name, seconds=90)
    kubectl("rollout", "status", "daemonset/echo", "--namespace", echo, "--timeout=90s")
    pods = kubectl.get("pods", "--namespace", echo, "--selector", "app=echo")["items"]
    own = next(pod for pod in pods if pod["spec"]["nodeName"] == node.name)
    until(
        "its pod answers",
        lambda: ask(f"http://{own['status']['podIP']}:8080") == node.name,
        seconds=30,
    )
