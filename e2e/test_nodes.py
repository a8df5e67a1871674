"""Loss of a node: streams on others go on, what was lost comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.cluster import Cluster
    from e2e.service import Service

pytestmark = pytest.mark.timeout(1500)
_LOST = "node2"
_KEPT = "node1"
"""Clients come in through this one."""
_HEAL_SECONDS = 480


@pytest.fixture
def settled(service: Service, cluster: Cluster) -> Iterator[Service]:
    """A service on both nodes, whose router is on the node that stays."""
    service.spec["router"]["podTemplate"] = {
        "spec": {"nodeSelector": {"kubernetes.io/hostname": _KEPT}}
    }
    service.apply()
    service.wait_until_settled()
    assert {pod["spec"]["nodeName"] for pod in service.pods("decode")} == {_KEPT, _LOST}
    assert {pod["spec"]["nodeName"] for pod in service.pods("prefill")} == {_KEPT, _LOST}
    yield service
    cluster.network.heal(_LOST)
    cluster.wait_for_node(_LOST)


def lost_stage(service: Service) -> str:
    """Return the number of the stage that is on the node to be lost."""
    [pod] = [p for p in service.pods("prefill") if p["spec"]["nodeName"] == _LOST]
    number: str = pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"]
    return number


def test_a_nodes_link_is_cut(settled: Service, cluster: Cluster) -> None:
    stage = lost_stage(settled)
    with settled.load() as load:
        cluster.network.cut(_LOST)
        # Requests in flight move to what is left, and go on without any prefill group.
        load.goes_on(answers=3, seconds=240)
        settled.wait_for("PrefillReady", "False", reason="GangIncomplete", says=stage, seconds=120)
        load.goes_on(answers=3, seconds=240)
        cluster.network.heal(_LOST)
        cluster.wait_for_node(_LOST)
        settled.wait_until_settled(seconds=_HEAL_SECONDS)
        load.goes_on()
    load.check()


def test_a_node_loses_power(settled: Service, cluster: Cluster) -> None:
    node = cluster.nodes[_LOST]
    with settled.load() as load:
        node.power_off()
        cluster.wait_for_node(_LOST, ready=False)
        load.goes_on(answers=3, seconds=240)
        node.start()
        cluster.wait_for_node(_LOST)
        settled.wait_until_settled(seconds=_HEAL_SECONDS)
        load.goes_on()
    load.check()


def test_a_node_hangs_for_a_while(settled: Service, cluster: Cluster) -> None:
    """Nothing on it ends: it only answers no more, and later goes on as if nothing had been."""
    node = cluster.nodes[_LOST]
    with settled.load() as load:
        node.freeze()
        try:
            cluster.wait_for_node(_LOST, ready=False)
            load.goes_on(answers=3, seconds=240)
        finally:
            node.thaw()
        cluster.wait_for_node(_LOST)
        settled.wait_until_settled(seconds=_HEAL_SECONDS)
        load.goes_on()
    load.check()


def test_kubelet_and_containerd_restart_without_a_pod_noticing(
    settled: Service, cluster: Cluster
) -> None:
    node = cluster.nodes[_LOST]
    before = {pod["metadata"]["uid"]: restarts(pod) for pod in settled.pods()}
    with settled.load() as load:
        node.stop_programs()
        load.goes_on()
        node.start()
        cluster.wait_for_node(_LOST)
        load.goes_on()
    load.check()
    after = {pod["metadata"]["uid"]: restarts(pod) for pod in settled.pods()}
    assert after == before


def test_the_api_server_goes_away_for_a_while(settled: Service, cluster: Cluster) -> None:
    """The data path does not need it: routers keep the workers that they know."""
    control = cluster.control
    with settled.load() as load:
        control.stop_api_server()
        load.goes_on(answers=10)
        control.start_api_server()
        load.goes_on()
    load.check()
    for name in cluster.settings.node_names:
        cluster.wait_for_node(name)
    until("the service is Ready", lambda: settled.wait_for("Ready"), seconds=_HEAL_SECONDS)


def restarts(pod: dict[str, object]) -> int:
    status = pod["status"]
    assert isinstance(status, dict)
    return sum(int(container["restartCount"]) for container in status["containerStatuses"])
