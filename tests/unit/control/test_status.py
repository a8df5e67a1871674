"""Conditions say what is, why, and since when."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator.errors import Problem
from penstock_operator.observed import Fault, Pod, RouterAnswer, Target, Workload
from penstock_operator.status import NEEDED, Observation, compute_status, transitions

if TYPE_CHECKING:
    from penstock_operator.api import Status
    from penstock_operator.labels import Role

NOW = datetime(2030, 1, 1, tzinfo=UTC)
OK = RouterAnswer(True, "passed")


def target(replicas: int, revision: str = "new") -> Target:
    return Target(replicas=replicas, revision=revision, layout="L")


def work(
    role: Role, ready: int, *, name: str = "", replicas: int = 1, rev: str = "new"
) -> Workload:
    return Workload(
        name=name or f"chat-{role}",
        role=role,
        revision=rev,
        layout="L",
        replicas=replicas,
        ready=ready,
    )


def pod(role: Role, state: Any = "ready", *, stage: int = 0, **more: Any) -> Pod:
    group = {"group": "chat-prefill-0"} if role == "prefill" else {}
    return Pod(
        name=f"chat-{role}-{stage}",
        role=role,
        workload=f"chat-{role}",
        revision="new",
        state=state,
        stage=stage,
        **{**group, **more},
    )


def seen(**more: Any) -> Observation:
    """Everything works, two stages and one decode worker, unless `more` says otherwise."""
    base = Observation(
        targets={"prefill": target(1), "decode": target(1), "router": target(1)},
        workloads=(
            work("prefill", 1, name="chat-prefill-0"),
            work("decode", 1),
            work("router", 1),
        ),
        pods=(pod("prefill"), pod("prefill", stage=1), pod("decode"), pod("router")),
        router=OK,
        url="http://127.0.0.1:8000",
    )
    return replace(base, **more)


def status(observation: Observation, previous: Status | None = None, *, at: int = 0) -> Status:
    return compute_status(
        observation, generation=3, previous=previous, now=NOW + timedelta(seconds=at)
    )


def verdict(found: Status, kind: str) -> tuple[str, str]:
    condition = found.condition(kind)
    return condition.status, condition.reason


def test_all_is_well() -> None:
    found = status(seen())
    assert verdict(found, "Ready") == ("True", "AllReady")
    assert verdict(found, "Progressing") == ("False", "Complete")
    assert verdict(found, "Degraded") == ("False", "AsExpected")
    assert found.prefill is not None
    assert [r.summary for r in (found.prefill, found.decode, found.router)] == ["1/1"] * 3
    assert {c.observed_generation for c in found.conditions} == {3}


def test_pods_alone_do_not_make_it_ready() -> None:
    refusing = status(seen(router=RouterAnswer(False, "no decode worker answers")))
    assert verdict(refusing, "Ready") == ("False", "NotReady")
    assert refusing.condition("Ready").message == "RouterReady: no decode worker answers"
    assert verdict(status(seen(router=None)), "Ready") == ("Unknown", "NotAnswering")


def test_aggregated_needs_no_prefill_and_no_transfer() -> None:
    found = status(
        seen(
            targets={"prefill": target(0), "decode": target(1), "router": target(1)},
            workloads=(work("decode", 1), work("router", 1)),
            pods=(pod("decode"), pod("router")),
        )
    )
    assert verdict(found, "Ready") == ("True", "AllReady")
    assert verdict(found, "KVTransferReady") == ("True", "Aggregated")
    assert found.prefill is None


def test_an_incomplete_gang_names_its_missing_stages() -> None:
    found = status(
        seen(
            workloads=(
                work("prefill", 0, name="chat-prefill-0"),
                work("decode", 1),
                work("router", 1),
            ),
            pods=(pod("prefill"), pod("prefill", "starting", stage=1), pod("decode")),
            router=RouterAnswer(False, "no prefill group"),
        )
    )
    assert verdict(found, "PrefillReady") == ("False", "GangIncomplete")
    message = found.condition("PrefillReady").message
    assert message == "chat-prefill-0 waits for stage 1 (starting)"


NO_GPU = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu"
TAINTED = "0/2 nodes are available: 2 node(s) had untolerated taints"


@pytest.mark.parametrize(
    ("stages", "reason", "message"),
    [
        (  # beside a stage that only starts, one that cannot be placed is what is missing
            [("starting", ""), ("pending", "Unschedulable")],
            "GangIncomplete",
            f"chat-prefill-0 waits for stage 1 (Unschedulable: {TAINTED})",
        ),
        (
            [("starting", ""), ("pending", "InsufficientGPU")],
            "InsufficientGPU",
            f"chat-prefill-0 waits for stage 1 (InsufficientGPU: {NO_GPU})",
        ),
        (  # nothing of the group is there: the scheduler's reason is all there is to tell
            [("pending", "Unschedulable"), ("pending", "Unschedulable")],
            "Unschedulable",
            f"chat-prefill-0: {TAINTED}",
        ),
        (
            [("ready", ""), ("draining", "")],
            "GangIncomplete",
            "chat-prefill-0 waits for stage 1 (draining)",
        ),
        (
            [("starting", "")],
            "GangIncomplete",
            "chat-prefill-0 waits for stage 1 (it has no pod)",
        ),
        (
            [("ready", ""), ("waiting", "CrashLooping")],
            "CrashLooping",
            "chat-prefill-1: exit code 3: boom",
        ),
        ([("starting", ""), ("starting", "")], "Starting", "chat-prefill-0: starting"),
        ([("starting", ""), ("pending", "")], "Starting", "chat-prefill-0: starting"),
    ],
)
def test_a_gang_tells_which_stages_are_missing_and_why(
    stages: list[tuple[str, str]], reason: str, message: str
) -> None:
    told = {
        "InsufficientGPU": NO_GPU,
        "Unschedulable": TAINTED,
        "CrashLooping": "exit code 3: boom",
    }
    pods = [
        pod("prefill", state, stage=number, fault=fault, message=told.get(fault, ""))
        for number, (state, fault) in enumerate(stages)
    ]
    group = replace(work("prefill", 0, name="chat-prefill-0"), stages=2)
    found = status(seen(workloads=(group,), pods=pods, router=None))
    condition = found.condition("PrefillReady")
    assert (condition.reason, condition.message) == (reason, message)


def test_a_role_scaled_to_zero_is_ready_while_the_router_holds_requests() -> None:
    asleep = replace(target(0), asleep=True)
    sleeping = seen(
        targets={"prefill": asleep, "decode": asleep, "router": target(1)},
        workloads=(work("router", 1),),
        pods=(pod("router"),),
        router=RouterAnswer(False, "no decode worker is listed", holds=True),
    )
    found = status(sleeping)
    assert verdict(found, "Ready") == ("True", "AllReady")
    for kind in ("ModelReady", "PrefillReady", "DecodeReady", "RouterReady", "KVTransferReady"):
        assert verdict(found, kind) == ("True", "ScaledToZero")
    assert found.prefill is not None
    broken = replace(sleeping, router=RouterAnswer(False, "draining"))
    assert verdict(status(broken), "Ready") == ("False", "NotReady")


def test_a_step_that_failed_and_pods_that_are_refused_are_told() -> None:
    nothing: dict[str, Any] = {"workloads": (), "pods": (), "router": None}
    failed = status(seen(**nothing, failure="PATCH deployments: quota"))
    assert verdict(failed, "DecodeReady") == ("False", "StepFailed")
    assert verdict(failed, "Degraded") == ("True", "StepFailed")
    refused = replace(work("decode", 0, name="chat-decode-a"), message="exceeded quota: gpus")
    found = status(seen(pods=(pod("router"),), workloads=(refused, work("router", 1))))
    assert verdict(found, "DecodeReady") == ("False", "PodsRefused")
    assert found.condition("Degraded").message == "chat-decode-a: exceeded quota: gpus"


def test_a_fault_explains_not_ready_before_its_consequences() -> None:
    crash = pod("decode", "waiting", fault="CrashLooping", message="exit code 3: boom", restarts=4)
    found = status(
        seen(
            workloads=(
                work("prefill", 0, name="chat-prefill-0"),
                work("decode", 0),
                work("router", 1),
            ),
            pods=(pod("prefill", "starting"), crash, pod("router")),
            router=RouterAnswer(False, "no worker"),
        )
    )
    assert verdict(found, "Ready") == ("False", "CrashLooping")
    assert found.condition("Ready").message == "DecodeReady: chat-decode-0: exit code 3: boom"
    assert verdict(found, "Degraded") == ("True", "CrashLooping")


def test_a_fault_beside_working_pods_degrades_without_ending_readiness() -> None:
    crash = pod("decode", "waiting", stage=1, fault="CrashLooping", message="exit code 1")
    found = status(
        seen(
            targets={"prefill": target(1), "decode": target(2), "router": target(1)},
            workloads=(
                work("prefill", 1, name="chat-prefill-0"),
                work("decode", 1, replicas=2),
                work("router", 1),
            ),
            pods=(*seen().pods, crash),
        )
    )
    assert verdict(found, "Ready") == ("True", "AllReady")
    assert verdict(found, "Degraded") == ("True", "CrashLooping")
    assert verdict(found, "Progressing") == ("True", "Starting")
    assert found.decode.summary == "1/2"


@pytest.mark.parametrize(
    ("fault", "reason", "message"),
    [
        ("", "ModelLoading", "chat-decode-0: loading weights (40%)"),
        ("ModelDownloading", "ModelDownloading", "chat-decode-0: loading weights (40%)"),
    ],
)
def test_the_way_of_the_weights_is_told(fault: Any, reason: str, message: str) -> None:
    loading = pod("decode", "starting", progress=0.4, message="loading weights", fault=fault)
    found = status(
        seen(
            workloads=(work("prefill", 1), work("decode", 0), work("router", 0)),
            pods=(pod("prefill"), loading),
            router=None,
        )
    )
    assert verdict(found, "ModelReady") == ("False", reason)
    assert found.condition("ModelReady").message == message
    assert verdict(found, "Degraded") == ("False", "AsExpected")


def test_a_rollout_is_progress_and_stays_ready() -> None:
    found = status(
        seen(
            workloads=(
                work("prefill", 1, name="chat-prefill-0"),
                work("decode", 1, name="a", rev="old"),
                work("decode", 0, name="b"),
                work("router", 1),
            )
        )
    )
    assert verdict(found, "Ready") == ("True", "AllReady")
    assert verdict(found, "Progressing") == ("True", "RevisionMixed")
    assert (found.decode.ready, found.decode.updated) == (1, 0)


@pytest.mark.parametrize(
    ("links", "answer", "expected"),
    [
        (None, None, ("Unknown", "NotReported")),
        (None, OK, ("True", "EndToEnd")),
        (frozenset({"chat-prefill-0"}), None, ("True", "LinksVerified")),
        (frozenset(), RouterAnswer(False, "x"), ("False", "NoLink")),
    ],
)
def test_kv_transfer_is_what_decode_workers_report(
    links: Any, answer: RouterAnswer | None, expected: tuple[str, str]
) -> None:
    pods = (pod("prefill"), pod("prefill", stage=1), pod("decode", groups_ready=links))
    found = status(seen(pods=pods, router=answer))
    assert verdict(found, "KVTransferReady") == expected


def test_an_invalid_spec_is_not_ready_with_all_its_reasons() -> None:
    found = status(seen(problems=(Problem("spec.a", "is wrong"), Problem("spec.b", "too"))))
    assert verdict(found, "Ready") == ("False", "Invalid")
    assert "spec.a: is wrong; spec.b: too" in found.condition("Ready").message


def test_a_message_is_cut_before_the_api_refuses_it() -> None:
    problems = [Problem(f"spec.a{number}", "is wrong") for number in range(10_000)]
    found = status(seen(problems=problems))
    assert len(found.condition("ConfigValid").message) < 3000


def test_a_transition_time_moves_only_on_a_flip() -> None:
    first = status(seen(router=None), at=0)
    same = status(seen(router=None), first, at=10)
    assert same == first
    ready = status(seen(), same, at=20)
    assert ready.condition("Ready").last_transition_time == NOW + timedelta(seconds=20)
    assert ready.condition("DecodeReady").last_transition_time == NOW
    assert {c.type for c in transitions(same, ready)} == {"Ready", "RouterReady", "KVTransferReady"}


def test_a_message_that_tells_the_progress_is_left_as_it_is() -> None:
    assert pod("decode", "starting", progress=0.4, message="weights: 38%").story == "weights: 38%"


pods_of_any_kind = st.builds(
    pod,
    st.sampled_from(["prefill", "decode", "router"]),
    st.sampled_from(["pending", "starting", "ready", "draining", "waiting", "stopped"]),
    stage=st.integers(0, 3),
    progress=st.floats(0, 1),
    message=st.text(max_size=5),
    fault=st.sampled_from(["", *get_args(Fault)]),
    groups_ready=st.sampled_from([None, frozenset(), frozenset({"chat-prefill-0"})]),
)


@settings(max_examples=75, deadline=None)
@given(
    st.lists(pods_of_any_kind, max_size=5),
    st.lists(
        st.builds(
            work,
            st.sampled_from(["prefill", "decode", "router"]),
            st.integers(0, 1),
            name=st.sampled_from(["a", "chat-prefill-0"]),
            rev=st.sampled_from(["old", "new"]),
        ),
        max_size=4,
    ),
    st.sampled_from([None, OK, RouterAnswer(False, "no")]),
    st.integers(0, 1),
)
def test_ready_is_the_conjunction_whatever_is_seen(
    pods: list[Pod], workloads: list[Workload], router: RouterAnswer | None, groups: int
) -> None:
    observation = seen(
        pods=pods,
        workloads=workloads,
        router=router,
        targets={"prefill": target(groups), "decode": target(1), "router": target(1)},
    )
    found = status(observation)
    needed = [found.condition(kind).status for kind in NEEDED]
    assert (found.condition("Ready").status == "True") == all(s == "True" for s in needed)
    assert all(c.reason and c.message for c in found.conditions)
    if found.condition("Ready").status == "True":
        assert router is OK
    order = [c.type for c in found.conditions]
    assert order == ["Ready", *NEEDED, "Progressing", "Degraded"]


def test_unknown_conditions_are_not_found() -> None:
    with pytest.raises(KeyError):
        status(seen()).condition("Nonsense")


def test_every_pair_of_states_has_an_explanation() -> None:
    for prefill, decode in product([0, 1], repeat=2):
        found = status(
            seen(
                workloads=(work("prefill", prefill), work("decode", decode), work("router", 1)),
                router=RouterAnswer(False, "not yet"),
            )
        )
        assert found.condition("Ready").status == "False"
