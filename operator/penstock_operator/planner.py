"""The next step of a rollout or a scaling. Pure: desired and observed in, actions out.

For each role, with n replicas wanted of the newest revision and `total` asked for in all:

    grow     newest ← min(n, n + surge - old)       so total never passes n + surge
    shrink   old    ← old - (old that are not ready, while total > n)
                          - (ready in all - n)       so ready never falls below n by our doing

Surge 0 is for a role that cannot have two replicas at once (the router of one machine): then
shrink may go one below n once the other roles are ready, and grow fills the gap.

Two revisions whose KV layouts differ cannot work together, so a service works in a layout only if
every role has a ready replica of it. The *anchor* is a layout that works, the target's if that
does. What shrink leaves alone for it:

    while another layout is the anchor     n of its ready replicas
    once the target's layout is the anchor its last ready replica of each role
    of any other old layout                one prefill group while it has decode workers,
                                           one decode worker while it has routers

Every step is decided from what is there, so it does not matter how it came to be there: a second
change, a scale or a restart in mid-rollout converges too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from penstock_operator.labels import ROLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock_operator.labels import Role
    from penstock_operator.observed import Target, Targets, Workload


@dataclass(frozen=True, slots=True)
class Create:
    """Make a workload of the newest revision."""

    role: Role
    replicas: int
    index: int = 0
    """Of a prefill group."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Ask for so many replicas of a Deployment."""

    name: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Drain and remove a workload."""

    name: str


Action: TypeAlias = Create | Scale | Delete
_AFTER: dict[Role, Role] = {"prefill": "decode", "decode": "router"}


@dataclass(slots=True)
class _Role:
    """One role's workloads, and how many replicas of each are to be kept."""

    target: Target
    workloads: list[Workload]
    keep: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.keep = {workload.name: workload.replicas for workload in self.workloads}

    @property
    def newest(self) -> list[Workload]:
        return [w for w in self.workloads if w.revision == self.target.revision]

    @property
    def old(self) -> list[Workload]:
        return [w for w in self.workloads if w.revision != self.target.revision]

    def ready_in(self, layout: str) -> int:
        return sum(w.ready for w in self.workloads if w.layout == layout)

    def asked_in(self, layout: str) -> int:
        return sum(w.replicas for w in self.workloads if w.layout == layout)


@dataclass(frozen=True, slots=True)
class _Budget:
    """How many replicas of each layout a role may lose: ready ones, and in all."""

    ready: dict[str, int]
    total: dict[str, int]

    def take(self, layout: str, count: int, *, ready: bool) -> int:
        """Return how many of `count` may go, and account for them."""
        if ready:
            count = min(count, self.ready[layout])
        count = min(count, self.total[layout])
        if ready:
            self.ready[layout] -= count
        self.total[layout] -= count
        return count


def plan(desired: Targets, observed: Sequence[Workload]) -> list[Action]:
    """Return what to do now; empty when there is nothing to do, or nothing but to wait.

    `desired` has a Target for every role. Raises KeyError otherwise.
    """
    active = [w for w in observed if w.replicas]
    roles = {role: _Role(desired[role], [w for w in active if w.role == role]) for role in ROLES}
    used = frozenset(w.index for w in observed if w.role == "prefill")
    actions: list[Action] = []
    for role in ROLES:
        actions += _plan_role(role, roles, used)
    return actions


def _plan_role(role: Role, roles: Mapping[Role, _Role], used: frozenset[int]) -> list[Action]:
    own = roles[role]
    if own.target.replicas == 0:
        return _retire(role, roles)
    old = sum(w.replicas for w in own.old)
    newest = sum(w.replicas for w in own.newest)
    wanted = own.target.replicas
    surge = own.target.surge if old else 0
    grown = max(0, min(wanted, wanted + surge - old))
    if grown > newest:
        return _grow(role, own, grown - newest, used)
    if newest > wanted:
        surplus = newest - wanted
        unready = min(surplus, sum(w.replicas - w.ready for w in own.newest))
        _drop(own, own.newest, unready=unready, ready=surplus - unready)
    elif old:
        _shrink(role, roles, old + newest)
    return _changes(own)


def _retire(role: Role, roles: Mapping[Role, _Role]) -> list[Action]:
    """Remove a role that sleeps, or one that the manifest no longer has and no router asks for."""
    if roles["router"].old and not roles[role].target.asleep:
        return []
    return [Delete(workload.name) for workload in roles[role].workloads]


def _shrink(role: Role, roles: Mapping[Role, _Role], total: int) -> None:
    """Take away old replicas as far as what is ready, and other roles, allow."""
    own = roles[role]
    wanted, in_place = own.target.replicas, own.target.surge == 0
    ready = sum(w.ready for w in own.workloads)
    unready_old = sum(w.replicas - w.ready for w in own.old)
    gap = 1 if in_place else 0
    _drop(
        own,
        own.old,
        unready=min(unready_old, max(gap, total - wanted)),
        ready=max(0, ready - wanted + gap),
        budget=_budget(role, roles),
    )


def _budget(role: Role, roles: Mapping[Role, _Role]) -> _Budget:
    own = roles[role]
    goal, anchor = own.target.layout, _anchor(roles)
    layouts = {w.layout for w in own.workloads}
    ready = {layout: own.ready_in(layout) for layout in layouts}
    total = {layout: own.asked_in(layout) for layout in layouts}
    if own.target.surge == 0:
        if not _works(roles, goal, without=role):
            ready = dict.fromkeys(layouts, 0)
    elif anchor is not None and anchor in layouts:
        needed = 1 if anchor == goal else own.target.replicas
        ready[anchor] = max(0, ready[anchor] - needed)
    for layout in layouts - {goal}:
        if role in _AFTER and roles[_AFTER[role]].asked_in(layout):
            total[layout] -= 1
    return _Budget(ready, total)


def _anchor(roles: Mapping[Role, _Role]) -> str | None:
    """Return a layout in which the service works, the target's if it does."""
    goal = roles["router"].target.layout
    others = sorted({w.layout for w in roles["router"].workloads} - {goal})
    return next((layout for layout in [goal, *others] if _works(roles, layout)), None)


def _works(roles: Mapping[Role, _Role], layout: str, *, without: Role | None = None) -> bool:
    return all(
        own.ready_in(layout)
        for role, own in roles.items()
        if own.target.replicas and role != without
    )


def _drop(
    own: _Role,
    candidates: list[Workload],
    *,
    unready: int,
    ready: int,
    budget: _Budget | None = None,
) -> None:
    """Keep fewer of the candidates: so many that are not ready, then so many that are.

    Other layouts than the target's go first, and of prefill groups the highest index.
    """
    budget = budget or _Budget(
        ready={w.layout: own.ready_in(w.layout) for w in candidates},
        total={w.layout: own.asked_in(w.layout) for w in candidates},
    )
    order = sorted(
        candidates, key=lambda w: (w.layout == own.target.layout, w.revision, -w.index, w.name)
    )
    for workload in order:
        count = min(unready, workload.replicas - workload.ready)
        taken = budget.take(workload.layout, count, ready=False)
        own.keep[workload.name] -= taken
        unready -= taken
    for workload in order:
        taken = budget.take(workload.layout, min(ready, workload.ready), ready=True)
        own.keep[workload.name] -= taken
        ready -= taken


def _grow(role: Role, own: _Role, count: int, used: frozenset[int]) -> list[Action]:
    if role == "prefill":
        free = (index for index in range(len(used) + count) if index not in used)
        return [Create(role, 1, index) for index, _ in zip(free, range(count), strict=False)]
    for workload in own.newest:
        return [Scale(workload.name, workload.replicas + count)]
    return [Create(role, count)]


def _changes(own: _Role) -> list[Action]:
    actions: list[Action] = []
    for workload in own.workloads:
        keep = own.keep[workload.name]
        if keep == 0:
            actions.append(Delete(workload.name))
        elif keep != workload.replicas:
            actions.append(Scale(workload.name, keep))
    return actions
