"""Whole lives of services on a cluster in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from penstock_operator import labels
from penstock_operator.cluster import kinds
from penstock_operator.cluster.transport import APPLY
from penstock_operator.cluster.workqueue import Wake
from penstock_operator.errors import LeaseLost
from tests.unit.operator_cluster.world import World

if TYPE_CHECKING:
    from penstock_operator.cluster.kinds import Object
    from penstock_operator.cluster.transport import Request

PIPELINE: Any = {"prefill": {"replicas": 1, "pipelineParallel": 2}, "decode": {"replicas": 2}}
KEY = ("default", "chat")


async def ready(**spec: Any) -> World:
    world = World()
    await world.watches.prime()
    world.apply(**(spec or PIPELINE))
    await world.settle()
    assert world.verdict()[0] == "True", world.status()
    return world


def scale(world: World, role: str, number: int) -> None:
    """Write a RoleScaler as an autoscaler does."""

    def write(obj: Object) -> None:
        obj["spec"]["replicas"] = number

    world.api.change(("rolescalers", "default", f"chat-{role}"), write, "autoscaler")


async def test_a_new_service_becomes_ready_with_all_its_objects() -> None:
    world = await ready()
    assert world.names(kinds.STATEFUL_SET) == ["chat-prefill-0"]
    assert len(world.names(kinds.DEPLOYMENT)) == 2
    assert world.names(kinds.SECRET) == ["chat-keys"]
    assert world.names(kinds.SCALER) == ["chat-router"]  # the others have their number themselves
    status = world.status()
    assert [status.decode.ready, status.router.ready] == [2, 1]
    assert status.prefill is not None
    assert status.prefill.ready == 1
    assert world.verdict("KVTransferReady")[1] == "LinksVerified"
    owner = world.api.get(kinds.SERVICE, "chat")["metadata"]["uid"]
    own = [s.obj for s in world.api.stored.values() if s.kind not in (kinds.SERVICE, kinds.POD)]
    children = [obj for obj in own if obj["kind"] != "Event"]
    assert all(obj["metadata"]["ownerReferences"][0]["uid"] == owner for obj in children)
    assert not world.failures


async def test_a_settled_service_costs_no_api_call_until_something_changes() -> None:
    world = await ready()
    world.api.calls.clear()
    await world.run(30)
    assert world.api.calls == []


async def test_a_full_resync_changes_nothing() -> None:
    world = await ready()
    world.api.writes.clear()
    await world.reconcile(KEY, Wake.FULL)
    assert world.api.writes == []


async def test_an_operator_that_starts_at_any_moment_changes_nothing_that_runs() -> None:
    """Each step is taken twice, by two operators that know nothing: the second only reports."""
    world = World()
    world.apply(**PIPELINE)
    for _ in range(20):
        await world.restart()
        await world.operate()
        world.api.writes.clear()
        await world.restart()
        await world.operate()
        assert [w for w in world.api.writes if not w[1].endswith("/status")] == []
        world.run_controllers()
        world.seconds += 2.0
    assert world.verdict()[0] == "True"
    world.api.writes.clear()
    world.api.calls.clear()
    await world.restart()
    await world.operate()
    assert world.api.writes == []
    assert {verb for verb, _ in world.api.calls} == {"get", "list"}


async def test_a_rollout_goes_on_with_a_new_operator_at_every_step() -> None:
    world = await ready()
    world.apply(prefill={**PIPELINE["prefill"], "extraArgs": ["--a"]}, decode={"extraArgs": ["-b"]})
    for _ in range(60):
        await world.restart()
        await world.step()
        assert world.verdict()[0] == "True"
    assert world.verdict("Progressing")[1] == "Complete"
    assert len(world.names(kinds.STATEFUL_SET)) == 1
    assert len(world.names(kinds.DEPLOYMENT)) == 2


async def test_steps_follow_each_other_although_nothing_else_happens() -> None:
    """No controller, no pod, no event of anybody: the plan is still carried out to its end."""
    world = World()
    world.apply(**PIPELINE)
    for args in ("--a", "--b"):
        world.apply(prefill=PIPELINE["prefill"], decode={"replicas": 3, "extraArgs": [args]})
        for _ in range(10):
            await world.operate()
            world.seconds += 2.0
    world.api.writes.clear()
    await world.restart()
    await world.operate()
    assert world.api.writes == []
    (deployment,) = [
        d for d in world.api.of(kinds.DEPLOYMENT) if "-decode-" in d["metadata"]["name"]
    ]
    assert deployment["spec"]["replicas"] == 3


async def test_a_rollout_with_a_second_change_in_the_middle_always_serves() -> None:
    world = await ready()
    world.apply(prefill={**PIPELINE["prefill"], "extraArgs": ["--a"]}, decode=PIPELINE["decode"])
    served = []
    for number in range(60):
        if number == 4:
            args = {"extraArgs": ["--b"]}
            world.apply(
                prefill={**PIPELINE["prefill"], **args}, decode={**PIPELINE["decode"], **args}
            )
        await world.step()
        served.append(world.verdict()[0])
    assert set(served) == {"True"}
    await world.settle()
    deployments = [n for n in world.names(kinds.DEPLOYMENT) if "-decode-" in n]
    assert len(deployments) == 1
    for obj in (*world.api.of(kinds.STATEFUL_SET), world.api.get(kinds.DEPLOYMENT, *deployments)):
        assert "--b" in obj["spec"]["template"]["spec"]["containers"][0]["args"]
    assert world.verdict("Progressing")[1] == "Complete"
    # The first group drains while the second serves, so their names cannot be the same.
    assert not world.failures


async def test_the_index_of_a_group_is_not_given_away_while_its_pods_drain() -> None:
    world = await ready()
    world.drain_steps = 10_000
    for args in ("--a", "--b"):
        world.apply(prefill={**PIPELINE["prefill"], "extraArgs": [args]}, decode={"replicas": 2})
        await world.run(30)
    assert world.names(kinds.STATEFUL_SET) == ["chat-prefill-2"]
    draining = [p for p in world.api.of(kinds.POD) if "deletionTimestamp" in p["metadata"]]
    groups = {pod["metadata"]["labels"][labels.GROUP] for pod in draining}
    assert groups == {"chat-prefill-0", "chat-prefill-1"}
    assert world.verdict()[0] == "True"


async def test_a_role_scaler_drives_its_role_and_is_never_fought() -> None:
    world = await ready(decode={}, prefill={"pipelineParallel": 2})
    assert world.names(kinds.SCALER) == ["chat-decode", "chat-prefill", "chat-router"]
    for number in (3, 1):
        for role in ("decode", "prefill"):
            scale(world, role, number)
        await world.settle()
        assert len(world.names(kinds.STATEFUL_SET)) == number
        assert world.status().decode.ready == number
        for role in ("decode", "prefill"):
            scaler = world.api.get(kinds.SCALER, f"chat-{role}")
            assert scaler["spec"]["replicas"] == number
            assert scaler["status"] == {
                "replicas": number,
                "selector": f"penstock.dev/service=chat,penstock.dev/role={role}",
            }
    await world.restart()
    await world.reconcile(KEY, Wake.FULL)
    assert world.api.get(kinds.SCALER, "chat-decode")["spec"]["replicas"] == 1


async def test_a_scaler_is_kept_within_the_bounds_of_the_manifest() -> None:
    world = await ready(decode={"autoscaling": {"minReplicas": 2, "maxReplicas": 3}})
    assert world.status().decode.ready == 2
    scaler = ("rolescalers", "default", "chat-decode")
    scale(world, "decode", 9)
    await world.settle()
    assert world.status().decode.ready == 3
    assert world.api.stored[scaler].obj["spec"]["replicas"] == 9


async def test_a_scaler_goes_when_the_manifest_takes_the_number_over() -> None:
    world = await ready(decode={})
    assert "chat-decode" in world.names(kinds.SCALER)
    world.apply(decode={"replicas": 2})
    await world.settle()
    assert world.names(kinds.SCALER) == ["chat-router"]
    assert world.status().decode.ready == 2


async def test_a_role_sleeps_when_idle_and_wakes_by_its_scaler() -> None:
    spec = {"autoscaling": {"minReplicas": 0, "maxReplicas": 2, "idleSeconds": 60}}
    world = await ready(decode=spec, prefill={**spec, "pipelineParallel": 2})
    await world.run(60)
    assert world.status().decode.ready == 1, "a router that has had requests keeps it awake"
    world.idle = 100.0
    await world.settle()
    assert world.names(kinds.STATEFUL_SET) == []
    assert [n for n in world.names(kinds.DEPLOYMENT) if "decode" in n] == []
    for condition in ("PrefillReady", "DecodeReady", "KVTransferReady", "RouterReady"):
        assert world.verdict(condition)[:2] == ("True", "ScaledToZero")
    assert world.verdict()[0] == "True"
    world.idle = 0.0
    for role in ("decode", "prefill"):
        scale(world, role, 1)
    await world.settle()
    assert world.verdict("DecodeReady")[1] == "Available"
    world.idle = 100.0
    await world.step()
    assert world.status().decode.replicas == 1, "it has only just become ready"


async def test_hand_edits_are_reverted() -> None:
    world = await ready()
    policy = ("networkpolicies", "default", "chat-workers")
    world.api.change(policy, lambda obj: obj["spec"].update(ingress=[]))
    world.api.change(
        ("services", "default", "chat-router"), lambda obj: obj["spec"].update(ports=[])
    )
    name = world.names(kinds.DEPLOYMENT)[0]
    world.api.change(
        ("deployments", "default", name),
        lambda obj: obj["spec"].update(replicas=7, selector={"matchLabels": {"x": "y"}}),
    )
    world.api.change(
        ("statefulsets", "default", "chat-prefill-0"), lambda obj: obj["spec"].update(replicas=5)
    )
    await world.settle()
    assert world.api.stored[policy].obj["spec"]["ingress"]
    assert world.api.stored["services", "default", "chat-router"].obj["spec"]["ports"]
    deployment = world.api.get(kinds.DEPLOYMENT, name)["spec"]
    assert deployment["replicas"] == 2
    assert labels.SERVICE in deployment["selector"]["matchLabels"]
    assert world.api.get(kinds.STATEFUL_SET, "chat-prefill-0")["spec"]["replicas"] == 2


async def test_an_edit_that_an_apply_cannot_be_merged_with_is_replaced() -> None:
    world = await ready()
    service = ("services", "default", "chat-router")
    world.api.change(service, lambda obj: obj["spec"].update(ports=[{"name": "http", "port": 9}]))

    def refuse(request: Request) -> tuple[int, str] | None:
        edited = world.api.stored[service].obj["spec"]["ports"][0]["port"] == 9
        applied = request.content_type == APPLY and request.path.endswith("/chat-router")
        return (422, "duplicate port name") if edited and applied else None

    world.api.refuse = refuse
    await world.settle()
    assert world.api.stored[service].obj["spec"]["ports"][0]["port"] == 8000
    assert not world.failures


@pytest.mark.parametrize("kind", [*kinds.SHARED, kinds.DEPLOYMENT, kinds.STATEFUL_SET])
async def test_deleted_objects_come_back(kind: kinds.Kind) -> None:
    world = await ready(decode={}, prefill={"pipelineParallel": 2})
    names = world.names(kind)
    world.api.remove((kind.plural, "default", names[0]))
    await world.settle()
    if kind is kinds.STATEFUL_SET:  # its first pods still drained
        assert world.names(kind) == ["chat-prefill-1"]
    else:
        assert world.names(kind) == names
    assert world.verdict()[0] == "True"


async def test_a_deleted_service_is_forgotten_and_its_objects_are_collected() -> None:
    world = await ready()
    world.api.remove(("inferenceservices", "default", "chat"))
    await world.settle()
    left = [s for s in world.api.stored.values() if s.kind is not kinds.EVENT]
    assert left == []
    assert world.children.count() == 0
    assert world.reconciler._memories == {}


async def test_a_service_made_again_under_its_name_takes_over_once_the_old_objects_are_gone() -> (
    None
):
    world = await ready()
    uid = world.api.get(kinds.SERVICE, "chat")["metadata"]["uid"]
    gone = world.api.stored.pop(("inferenceservices", "default", "chat"))
    world.api.events.append((kinds.SERVICE, "DELETED", gone.obj))
    world.apply(**PIPELINE)  # before the garbage collector has done anything
    await world.run(3)
    assert any("only one reference" in failure for failure in world.failures)
    for key, stored in list(world.api.stored.items()):
        owners = stored.obj["metadata"].get("ownerReferences", [])
        if any(owner["uid"] == uid for owner in owners):
            world.api.remove(key)
    await world.settle()
    assert world.verdict()[0] == "True"


async def test_a_bad_spec_beside_a_good_one_is_told_and_keeps_what_runs() -> None:
    world = await ready()
    world.apply("other", **PIPELINE)
    await world.settle()
    before = sorted(world.names(kinds.POD))
    world.api.change(
        ("inferenceservices", "default", "other"),
        lambda obj: obj["spec"].update(nonsense=True, decode={"replicas": -1}),
        "kubectl",
    )
    world.apply(decode={"replicas": 3}, prefill=PIPELINE["prefill"])
    await world.settle()
    assert world.verdict("ConfigValid", "other")[:2] == ("False", "Invalid")
    assert "spec.nonsense: unknown field" in world.verdict("ConfigValid", "other")[2]
    assert world.verdict(name="other")[:2] == ("False", "Invalid")
    assert world.verdict("DecodeReady", "other")[0] == "True"
    assert [name for name in world.names(kinds.POD) if name.startswith("other")] == [
        name for name in before if name.startswith("other")
    ]
    assert world.status("chat").decode.ready == 3
    world.apply("other", **PIPELINE)
    await world.settle()
    assert world.verdict(name="other")[0] == "True"


async def test_what_the_api_refuses_is_told_and_does_not_keep_the_rest_from_running() -> None:
    world = World()
    world.api.refuse = lambda request: (
        (403, "exceeded quota: no more budgets") if "poddisruptionbudgets" in request.path else None
    )
    world.apply(**PIPELINE)
    await world.run(20)
    assert world.verdict()[0] == "True"
    status, reason, message = world.verdict("Degraded")
    assert (status, reason) == ("True", "StepFailed")
    assert "exceeded quota" in message
    world.api.refuse = lambda request: None
    await world.settle()
    assert world.verdict("Degraded")[0] == "False"


@pytest.mark.parametrize("how", ["before", "after"])
async def test_an_error_at_any_call_is_retried_and_converges(how: str) -> None:
    """Fail the n-th call of the life of a service, for every n there is."""
    number = 0
    while True:
        number += 1
        world, calls = World(), 0

        def fail(request: Request, number: int = number) -> str | None:
            nonlocal calls
            if request.method == "GET" and "events" in request.path:
                return None
            calls += 1
            return how if calls == number else None

        world.api.fail = fail
        world.apply(**PIPELINE)
        await world.settle()
        world.apply(prefill=PIPELINE["prefill"], decode={"replicas": 1, "extraArgs": ["--x"]})
        await world.settle()
        assert world.verdict()[0] == "True", (number, world.status())
        assert world.status().decode.updated == 1
        assert len(world.names(kinds.DEPLOYMENT)) == 2
        assert len(world.names(kinds.STATEFUL_SET)) == 1
        if calls < number:
            break
    assert number > 30


async def test_an_api_server_that_is_away_for_long_changes_nothing() -> None:
    world = await ready()
    world.api.fail = lambda request: "before"
    await world.reconcile(KEY, Wake.FULL)
    await world.run(10)
    world.api.fail = lambda request: None
    events = len(world.api.events)
    await world.settle()
    assert len(world.api.events) == events
    assert world.verdict()[0] == "True"


async def test_without_the_lease_nothing_is_written() -> None:
    world = World()
    world.apply(**PIPELINE)
    await world.run(2)
    world.lease.held = False
    events = len(world.api.events)
    world.apply(decode={"replicas": 5})
    with pytest.raises(LeaseLost):
        await world.run(3)
    assert [kind for kind, _, _ in world.api.events[events:] if kind is not kinds.SERVICE] == [
        kind for kind, _, _ in world.api.events[events:] if kind is kinds.POD
    ]
    assert not any(verb != "get" for verb, _ in world.api.calls[-1:])


async def test_the_emptiest_decode_worker_goes_first() -> None:
    world = await ready(decode={"replicas": 3})
    busy = [n for n in world.names(kinds.POD) if "decode" in n][1]
    answers = world.ask

    async def ask(*args: Any, **more: Any) -> Any:
        told = await answers(*args, **more)
        from dataclasses import replace

        uid = world.api.get(kinds.POD, busy)["metadata"]["uid"]
        told.workers[uid] = replace(told.workers[uid], load=7)
        return told

    world.ask = ask  # type: ignore[method-assign]
    world.apply(decode={"replicas": 1})
    await world.settle()
    assert [n for n in world.names(kinds.POD) if "decode" in n] == [busy]
    assert labels.DELETION_COST in world.api.get(kinds.POD, busy)["metadata"]["annotations"]


async def test_events_tell_of_flips_once() -> None:
    world = await ready()
    told = [(e["type"], e["reason"], e["message"]) for e in world.api.of(kinds.EVENT)]
    assert ("Normal", "AllReady", "Ready: requests through the router succeed") in told
    assert len(told) == len(set(told))
    assert all(e["involvedObject"]["name"] == "chat" for e in world.api.of(kinds.EVENT))
    await world.restart()
    await world.run(10)
    assert len(world.api.of(kinds.EVENT)) == len(told)


async def test_an_event_that_cannot_be_posted_is_counted_and_nothing_more() -> None:
    world = World()
    world.api.refuse = lambda request: (403, "no") if request.path.endswith("/events") else None
    world.apply(**PIPELINE)
    await world.settle()
    assert world.verdict()[0] == "True"
    assert world.metrics.events_failed._value.get() > 0


# --- not ready, and why -------------------------------------------------------------------------


def only(name: str, status: Object) -> Any:
    return lambda pod: status if name in pod["metadata"]["name"] else None


def unscheduled(message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return {"phase": "Pending", "conditions": [{**condition, "message": message}]}


def waiting(reason: str, message: str = "", /, **last: Any) -> Object:
    status = {
        "name": "worker",
        "image": "penstock/runtime:0.1.0",
        "ready": False,
        "restartCount": 1 if last else 0,
        "state": {"waiting": {"reason": reason, "message": message}},
        "lastState": {"terminated": last} if last else {},
    }
    return {"phase": "Pending", "conditions": [], "containerStatuses": [status]}


@pytest.mark.parametrize(
    ("pod", "status", "condition", "reason", "says"),
    [
        (
            "decode",
            waiting("ImagePullBackOff", "Back-off pulling image"),
            "DecodeReady",
            "ImagePullFailed",
            "penstock/runtime:0.1.0: Back-off pulling image",
        ),
        (
            "chat-prefill-0",
            unscheduled("0/2 nodes are available: 2 Insufficient nvidia.com/gpu."),
            "PrefillReady",
            "InsufficientGPU",
            "0/2 nodes are available",
        ),
        (
            "chat-prefill-0-1",
            unscheduled("0/2 nodes are available: 2 node(s) had untolerated taint."),
            "PrefillReady",
            "GangIncomplete",
            "chat-prefill-0 waits for stage 1 (Unschedulable: 0/2 nodes are available",
        ),
        (
            "chat-prefill-0-1",
            unscheduled("0/2 nodes are available: 1 Insufficient nvidia.com/gpu."),
            "PrefillReady",
            "InsufficientGPU",
            "chat-prefill-0 waits for stage 1 (InsufficientGPU",
        ),
        (
            "chat-prefill-0-0",
            waiting("CrashLoopBackOff", exitCode=3, message="loading\nboom: it broke\n"),
            "PrefillReady",
            "CrashLooping",
            "chat-prefill-0-0: exit code 3: boom: it broke",
        ),
        (
            "decode",
            waiting("CrashLoopBackOff", exitCode=137, reason="OOMKilled"),
            "DecodeReady",
            "CrashLooping",
            "out of memory (OOMKilled)",
        ),
        (
            "decode",
            waiting("CrashLoopBackOff", exitCode=66, message="no model at /models/tiny"),
            "DecodeReady",
            "ModelNotFound",
            "exit code 66: no model at /models/tiny",
        ),
        (
            "decode",
            waiting("CrashLoopBackOff", exitCode=78, message="3 stages cannot share"),
            "DecodeReady",
            "ConfigRefused",
            "exit code 78: 3 stages cannot share",
        ),
    ],
)
async def test_what_is_wrong_is_told_and_clears_by_itself(
    pod: str, status: Object, condition: str, reason: str, says: str
) -> None:
    world = World()
    world.broken = only(pod, status)
    world.apply(**PIPELINE)
    await world.run(8)
    found = world.verdict(condition)
    assert found[:2] == ("False", reason)
    assert says in found[2]
    assert world.verdict()[:2] == ("False", reason)
    assert world.verdict("Degraded")[0] == "True"
    world.broken = lambda pod: {"phase": "Pending"} if "waits" in pod else None
    for obj in world.api.of(kinds.POD):
        if pod in obj["metadata"]["name"]:
            name = obj["metadata"]["name"]
            world.api.change(
                ("pods", "default", name), lambda o: o.update(status={"phase": "Pending"})
            )
    await world.settle()
    assert world.verdict()[0] == "True"
    assert world.verdict("Degraded")[0] == "False"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('MountVolume.SetUp failed for volume "model" : /m is not a directory', "ModelNotFound"),
        ('MountVolume.SetUp failed for volume "keys" : no secret chat-keys', "MountFailed"),
    ],
)
async def test_a_volume_that_cannot_be_mounted_is_told_by_the_pods_events(
    message: str, reason: str
) -> None:
    world = World()
    world.broken = only("decode", waiting("ContainerCreating"))
    world.apply(**PIPELINE)
    await world.run(3)
    for pod in world.api.of(kinds.POD):
        for when, why in (("01", "FailedMount"), ("00", "Scheduled")):
            world.api.put(
                kinds.EVENT,
                {
                    "metadata": {
                        "name": f"{pod['metadata']['name']}.{when}",
                        "namespace": "default",
                    },
                    "involvedObject": {"uid": pod["metadata"]["uid"]},
                    "reason": why,
                    "message": message,
                    "lastTimestamp": f"2030-01-01T00:00:{when}Z",
                },
            )
    world.api.remove(("secrets", "default", "chat-keys"))
    await world.run(3)
    found = world.verdict("DecodeReady")
    assert found[1] == reason
    assert message in found[2]
    assert ("chat-keys" in world.names(kinds.SECRET)) == (reason == "MountFailed")


async def test_rdma_that_no_node_has_is_told_with_the_setting() -> None:
    rdma = {"resources": {"rdma": {"resource": "rdma/ib", "count": 8}}}
    world = World()
    world.broken = only("decode", unscheduled("0/2 nodes are available: 2 Insufficient rdma/ib."))
    world.apply(decode=rdma)
    await world.run(6)
    status, reason, message = world.verdict("DecodeReady")
    assert (status, reason) == ("False", "RDMAUnavailable")
    assert "spec.decode.resources.rdma" in message
    assert "8 of rdma/ib" in message
    world.broken = lambda pod: None
    for obj in world.api.of(kinds.POD):
        name = obj["metadata"]["name"]
        world.api.change(("pods", "default", name), lambda o: o.update(status={"phase": "Pending"}))
    await world.settle()
    assert world.verdict()[0] == "True"
    assert world.verdict("Degraded")[:2] == ("True", "TransportFallback")


async def test_a_missing_stage_is_told_with_why_it_is_missing() -> None:
    world = await ready()
    world.api.remove(("pods", "default", "chat-prefill-0-1"))
    world.broken = lambda pod: (
        {"phase": "Pending"} if pod["metadata"]["name"] == "chat-prefill-0-1" else None
    )
    await world.operate()
    assert world.verdict("PrefillReady")[1:] == (
        "GangIncomplete",
        "chat-prefill-0 waits for stage 1 (it has no pod)",
    )
    world.broken = lambda pod: None
    await world.settle()
    assert world.verdict()[0] == "True"
