"""Whole trajectories of rollouts, listed step by step, and their invariants from any state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator.labels import ROLES, Role
from penstock_operator.observed import Target, Targets, Workload, converged
from penstock_operator.planner import (
    Action,
    Create,
    Delete,
    Scale,
    plan,
)

if TYPE_CHECKING:
    import random


def desired(
    prefill: int = 1,
    decode: int = 1,
    router: int = 1,
    *,
    rev: str = "a",
    layout: str = "L",
    router_surge: int = 1,
) -> dict[Role, Target]:
    return {
        "prefill": Target(replicas=prefill, revision=f"p{rev}", layout=layout),
        "decode": Target(replicas=decode, revision=f"d{rev}", layout=layout),
        "router": Target(replicas=router, revision=f"r{rev}", layout=layout, surge=router_surge),
    }


@dataclass
class Cluster:
    """Does what it is told; pods become ready when `settle` says so."""

    workloads: dict[str, Workload] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def apply(self, target: Targets, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Create(role, replicas, index):
                    goal = target[role]
                    suffix = str(index) if role == "prefill" else goal.revision
                    name = f"{role}-{suffix}"
                    assert name not in self.workloads, f"{name} exists already"
                    self.workloads[name] = Workload(
                        name=name,
                        role=role,
                        revision=goal.revision,
                        layout=goal.layout,
                        index=index,
                        replicas=replicas,
                    )
                    self.history.append(f"create {name} x{replicas}")
                case Scale(name, replicas):
                    old = self.workloads[name]
                    assert old.role != "prefill"
                    self.workloads[name] = replace(
                        old, replicas=replicas, ready=min(old.ready, replicas)
                    )
                    self.history.append(f"scale {name} to {replicas}")
                case Delete(name):
                    del self.workloads[name]
                    self.history.append(f"delete {name}")

    def settle(self, broken: frozenset[str] = frozenset()) -> None:
        for name, workload in self.workloads.items():
            if workload.revision not in broken:
                self.workloads[name] = replace(workload, ready=workload.replicas)

    def observed(self) -> list[Workload]:
        return list(self.workloads.values())

    def ready(self, role: Role, layout: str | None = None) -> int:
        return sum(
            w.ready for w in self.observed() if w.role == role and layout in (None, w.layout)
        )

    def asked(self, role: Role) -> int:
        return sum(w.replicas for w in self.observed() if w.role == role)

    def serves(self, with_prefill: bool = True) -> bool:
        """One layout has a ready router, decode worker and, if asked for, prefill group."""
        chain: list[Role] = ["router", "decode", *(["prefill"] if with_prefill else [])]  # type: ignore[list-item]
        layouts = {w.layout for w in self.observed()}
        return any(all(self.ready(role, layout) for role in chain) for layout in layouts)

    def run(self, target: Targets, *, broken: frozenset[str] = frozenset()) -> list[str]:
        """Step until nothing happens any more; return what happened."""
        start = len(self.history)
        for _ in range(200):
            self.settle(broken)
            actions = plan(target, self.observed())
            if not actions:
                return self.history[start:]
            self.apply(target, actions)
        raise AssertionError("no end after 200 steps:\n" + "\n".join(self.history))


def started(target: Targets) -> Cluster:
    cluster = Cluster()
    cluster.run(target)
    cluster.settle()
    assert converged(target, cluster.observed())
    return cluster


def test_a_new_service_starts_everything_at_once() -> None:
    target = desired(2, 3, 1)
    assert plan(target, []) == [
        Create("prefill", 1, 0),
        Create("prefill", 1, 1),
        Create("decode", 3),
        Create("router", 1),
    ]


def test_a_rollout_surges_one_at_a_time_new_before_old() -> None:
    cluster = started(desired(2, 2, 1, rev="a"))
    assert cluster.run(desired(2, 2, 1, rev="b")) == [
        "create prefill-2 x1",
        "create decode-db x1",
        "create router-rb x1",
        "delete prefill-1",
        "scale decode-da to 1",
        "delete router-ra",
        "create prefill-1 x1",
        "scale decode-db to 2",
        "delete prefill-0",
        "delete decode-da",
    ]


def test_another_kv_layout_keeps_a_working_chain_of_each_layout() -> None:
    cluster = started(desired(1, 1, 1, rev="a", layout="old"))
    assert cluster.run(desired(1, 1, 1, rev="b", layout="new")) == [
        "create prefill-1 x1",
        "create decode-db x1",
        "create router-rb x1",
        "delete router-ra",
        "delete decode-da",
        "delete prefill-0",
    ]


def test_a_role_without_surge_is_replaced_in_place_when_the_new_chain_is_ready() -> None:
    cluster = started(desired(rev="a", layout="old"))
    steps = cluster.run(desired(rev="b", layout="new", router_surge=0))
    assert steps.index("delete router-ra") > steps.index("create decode-db x1")
    assert steps.index("create router-rb x1") > steps.index("delete router-ra")
    cluster.settle()
    assert converged(desired(rev="b", layout="new"), cluster.observed())


def test_scaling_goes_straight_there() -> None:
    cluster = started(desired(1, 1, 1))
    assert cluster.run(desired(3, 4, 1)) == [
        "create prefill-1 x1",
        "create prefill-2 x1",
        "scale decode-da to 4",
    ]
    assert cluster.run(desired(1, 2, 1)) == [
        "delete prefill-1",
        "delete prefill-2",
        "scale decode-da to 2",
    ]


def test_a_broken_revision_never_takes_the_working_one_away() -> None:
    cluster = started(desired(2, 2, 1, rev="a"))
    broken = frozenset({"pb", "db", "rb"})
    steps = cluster.run(desired(2, 2, 1, rev="b"), broken=broken)
    assert steps == ["create prefill-2 x1", "create decode-db x1", "create router-rb x1"]
    assert cluster.serves()
    cluster.run(desired(2, 2, 1, rev="c"), broken=broken)
    cluster.settle()
    assert converged(desired(2, 2, 1, rev="c"), cluster.observed())


def test_prefill_taken_out_of_the_manifest_goes_after_the_router_that_asks_for_it() -> None:
    cluster = started(desired(2, 1, 1))
    target = {**desired(0, 1, 1), "router": Target(replicas=1, revision="rb", layout="L")}
    assert cluster.run(target) == [
        "create router-rb x1",
        "delete router-ra",
        "delete prefill-0",
        "delete prefill-1",
    ]


def test_a_role_that_sleeps_goes_at_once_and_comes_back_in_the_newest_revision() -> None:
    cluster = started(desired(2, 2, 1, rev="a"))
    asleep = {role: replace(goal, replicas=0, asleep=True) for role, goal in desired().items()}
    sleeping = {**desired(rev="b"), "prefill": asleep["prefill"], "decode": asleep["decode"]}
    steps = cluster.run(sleeping)
    assert {"delete prefill-0", "delete prefill-1", "delete decode-da"} <= set(steps[:4])
    cluster.settle()
    assert converged(sleeping, cluster.observed())
    assert cluster.run(desired(rev="b")) == ["create prefill-0 x1", "create decode-db x1"]


def test_a_converged_service_is_left_alone() -> None:
    target = desired(2, 2, 2)
    assert plan(target, started(target).observed()) == []


counts = st.integers(1, 4)


@st.composite
def targets(draw: st.DrawFn) -> dict[Role, Target]:
    return desired(
        draw(counts),
        draw(counts),
        draw(counts),
        rev=draw(st.sampled_from("abc")),
        layout=draw(st.sampled_from(["L", "M"])),
        router_surge=draw(st.sampled_from([0, 1])),
    )


@st.composite
def sleepy_targets(draw: st.DrawFn) -> dict[Role, Target]:
    """Targets of which prefill, decode or both may sleep."""
    target = draw(targets())
    sleepy: list[Role] = ["prefill", "decode"]
    for role in draw(st.sets(st.sampled_from(sleepy))):
        target[role] = replace(target[role], replicas=0, asleep=True)
    return target


@st.composite
def any_state(draw: st.DrawFn) -> list[Workload]:
    """Leftovers of whatever happened before: any mix of revisions, layouts and readiness."""
    found: list[Workload] = []
    for index in range(draw(st.integers(0, 4))):
        rev, layout = draw(st.sampled_from("abcd")), draw(st.sampled_from(["L", "M"]))
        found.append(
            Workload(
                name=f"prefill-{index}",
                role="prefill",
                revision=f"p{rev}",
                layout=layout,
                index=index,
                replicas=1,
                ready=draw(st.integers(0, 1)),
            )
        )
    for role in ROLES[1:]:
        for rev in draw(st.sets(st.sampled_from("abcd"), max_size=3)):
            replicas = draw(st.integers(1, 4))
            found.append(
                Workload(
                    name=f"{role}-{role[0]}{rev}",
                    role=role,
                    revision=f"{role[0]}{rev}",
                    layout=draw(st.sampled_from(["L", "M"])),
                    replicas=replicas,
                    ready=draw(st.integers(0, replicas)),
                )
            )
    return found


@settings(max_examples=100, deadline=None)
@given(sleepy_targets(), any_state())
def test_converges_from_any_state(target: dict[Role, Target], state: list[Workload]) -> None:
    # A revision has one layout: leftovers of the target's revision have the target's.
    state = [
        replace(w, layout=target[w.role].layout) if w.revision == target[w.role].revision else w
        for w in state
    ]
    cluster = Cluster({w.name: w for w in state})
    cluster.run(target)
    cluster.settle()
    assert converged(target, cluster.observed())


@settings(max_examples=75, deadline=None)
@given(st.lists(targets(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_service_answers_through_any_series_of_changes(
    changes: list[dict[Role, Target]], rng: random.Random
) -> None:
    """Pods become ready in any order, changes come at any moment, and somebody always serves.

    Nothing fails by itself here, so a lapse would be of the planner's making.
    """
    # A revision stands for one pod template, so its layout cannot vary between changes.
    changes = [
        {
            role: replace(t, revision=f"{t.revision}{t.layout}", surge=1)
            for role, t in target.items()
        }
        for target in changes
    ]
    cluster = started(changes[0])
    for target in changes[1:]:
        for _ in range(rng.randint(0, 6)):
            _one_step(cluster, target, rng)
            assert cluster.serves(), cluster.history
    final = changes[-1]
    for _ in range(300):
        if converged(final, cluster.observed()):
            break
        _one_step(cluster, final, rng)
        assert cluster.serves(), cluster.history
    assert converged(final, cluster.observed()), cluster.history


def _one_step(cluster: Cluster, target: Targets, rng: random.Random) -> None:
    before = {role: (cluster.asked(role), cluster.ready(role)) for role in ROLES}
    cluster.apply(target, plan(target, cluster.observed()))
    for role, goal in target.items():
        asked, ready = before[role]
        assert cluster.asked(role) <= max(asked, goal.replicas + goal.surge)
        assert cluster.ready(role) >= min(ready, goal.replicas), "ready replicas were taken away"
    for name, workload in list(cluster.workloads.items()):
        if rng.random() < 0.4:
            grown = min(workload.replicas, workload.ready + 1)
            cluster.workloads[name] = replace(workload, ready=grown)


@pytest.mark.parametrize("missing", ROLES)
def test_every_role_needs_a_target(missing: Role) -> None:
    target = desired()
    del target[missing]
    with pytest.raises(KeyError):
        plan(target, [])
