"""What the operator remembers of the objects of each service, from LISTs, watches and answers.

Only what a reconcile reads is kept, about a kilobyte an object. `Children` never goes back in time:
of one object only a newer resourceVersion counts, and what was deleted stays deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock_operator import labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from penstock_operator.cluster.kinds import Key, Kind, Object

_LONGEST_TEXT = 1024
"""Characters of a message that are kept: the end, where logs tell the cause."""
_TOMBSTONES = 10_000
"""Uids of deleted objects that are remembered: more than are deleted while an event is on its way.
"""

ChildId: TypeAlias = tuple[str, str]
"""Kind and name."""


@dataclass(frozen=True, slots=True)
class Child:
    """One object of a service. Two are equal if a reconcile would see no difference."""

    kind: str
    name: str
    uid: str
    owner: str
    """Uid of its controller, empty if it has none."""
    deleting: bool
    signature: str
    """Changes when somebody changes what was asked for: generation or version, labels, owners."""
    applied: str
    """The hash that the operator noted when it applied the object."""
    labels: Mapping[str, str]
    body: Object
    """The parts of the object that are read, in their places."""

    @property
    def spec(self) -> Object:
        """Of the object; empty if nothing of it is read."""
        return _map(self.body.get("spec"))

    @property
    def status(self) -> Object:
        """Of the object; empty if nothing of it is read."""
        return _map(self.body.get("status"))


class Children:
    """The objects of all services."""

    def __init__(self) -> None:
        self._found: dict[Key, dict[ChildId, Child]] = defaultdict(dict)
        self._versions: dict[str, int] = {}
        """Of each object by uid: the newest version that was seen."""
        self._gone: dict[str, None] = {}
        """Uids of deleted objects, oldest first."""

    def of(self, key: Key) -> dict[ChildId, Child]:
        """Return the objects of one service. A copy: it does not change any more."""
        return dict(self._found.get(key, {}))

    def services(self) -> list[Key]:
        """Return the services of which objects are known."""
        return list(self._found)

    def count(self) -> int:
        """Return the number of objects."""
        return sum(map(len, self._found.values()))

    def put(self, kind: Kind, obj: Object) -> Key | None:
        """Note an object. Return its service if a reconcile could see a difference."""
        meta = _map(obj.get("metadata"))
        uid, version = str(meta.get("uid")), version_of(obj)
        service = _map(meta.get("labels")).get(labels.SERVICE)
        if not service or uid in self._gone or version <= self._versions.get(uid, -1):
            return None
        key = (str(meta.get("namespace")), str(service))
        child = child_of(kind, obj)
        before = self._found[key].get((kind.name, child.name))
        if before is not None and before.uid != uid:
            self._versions.pop(before.uid, None)
        self._versions[uid] = version
        self._found[key][kind.name, child.name] = child
        return key if child != before else None

    def remove(self, kind: Kind, key: Key, name: str, uid: str) -> bool:
        """Forget a deleted object. Return whether it was known."""
        self._gone[uid] = None
        if len(self._gone) > _TOMBSTONES:
            del self._gone[next(iter(self._gone))]
        self._versions.pop(uid, None)
        found = self._found.get(key, {})
        child = found.get((kind.name, name))
        if child is None or child.uid != uid:
            return False
        del found[kind.name, name]
        if not found:
            del self._found[key]
        return True

    def version(self, uid: str) -> int | None:
        """Return the newest version seen of an object, None if it is not known."""
        return self._versions.get(uid)

    def is_gone(self, uid: str) -> bool:
        """Return whether the object was deleted lately."""
        return uid in self._gone


def version_of(obj: Object) -> int:
    """Return an object's resourceVersion. Since 1.35 their order is part of the API."""
    text = _map(obj.get("metadata")).get("resourceVersion")
    return int(text) if isinstance(text, str) and text.isdigit() else 0


def child_of(kind: Kind, obj: Object) -> Child:
    """Return what is kept of an object."""
    meta = _map(obj.get("metadata"))
    owners = [o for o in _list(meta.get("ownerReferences")) if o.get("controller")]
    own = {str(name): str(value) for name, value in _map(meta.get("labels")).items()}
    refs = sorted(str(owner.get("uid")) for owner in _list(meta.get("ownerReferences")))
    changed = meta.get("generation") or meta.get("resourceVersion")
    select = _SELECT.get(kind.name)
    annotations = _map(meta.get("annotations"))
    return Child(
        kind=kind.name,
        name=str(meta.get("name")),
        uid=str(meta.get("uid")),
        owner=str(owners[0].get("uid")) if owners else "",
        deleting="deletionTimestamp" in meta,
        signature="" if kind.name == "Pod" else digest([changed, own, refs]),
        applied=str(annotations.get(labels.APPLIED) or ""),
        labels=own,
        body=select(obj) if select else {},
    )


def digest(value: object) -> str:
    """Return a short hash of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- what is kept of each kind ----------------------------------------------------------------


def _replicas(obj: Object) -> Object:
    spec, status = _map(obj.get("spec")), _map(obj.get("status"))
    conditions = [
        _text(_pick(condition, ("type", "status", "reason", "message")))
        for condition in _list(status.get("conditions"))
        if condition.get("type") == "ReplicaFailure"
    ]
    return {"spec": _pick(spec, ("replicas",)), "status": {"conditions": conditions}}


def _scaler(obj: Object) -> Object:
    return {
        "spec": _pick(_map(obj.get("spec")), ("role", "replicas")),
        "status": _pick(_map(obj.get("status")), ("replicas", "selector")),
    }


def _pod(obj: Object) -> Object:
    meta, spec, status = (_map(obj.get(part)) for part in ("metadata", "spec", "status"))
    containers = [
        {"name": c.get("name"), "resources": _pick(_map(c.get("resources")), ("requests",))}
        for c in _list(spec.get("containers"))
    ]
    conditions = [
        _text(_pick(condition, ("type", "status", "reason", "message")))
        for condition in _list(status.get("conditions"))
    ]
    volumes = [
        _pick(volume, ("name", "persistentVolumeClaim")) for volume in _list(spec.get("volumes"))
    ]
    return {
        "metadata": {"annotations": _pick(_map(meta.get("annotations")), (labels.DELETION_COST,))},
        "spec": {
            **_pick(spec, ("nodeName",)),
            "containers": containers,
            "volumes": [v for v in volumes if "persistentVolumeClaim" in v],
        },
        "status": {
            **_pick(status, ("phase", "podIP", "reason", "message")),
            "conditions": conditions,
            "initContainerStatuses": _containers(status.get("initContainerStatuses")),
            "containerStatuses": _containers(status.get("containerStatuses")),
        },
    }


def _containers(statuses: Any) -> list[Object]:
    kept = ("name", "image", "ready", "restartCount")
    return [
        {
            **_pick(status, kept),
            "state": _state(status.get("state")),
            "lastState": _state(status.get("lastState")),
        }
        for status in _list(statuses)
    ]


def _state(state: Any) -> Object:
    kept = ("reason", "message", "exitCode")
    return {name: _text(_pick(_map(value), kept)) for name, value in _map(state).items()}


_SELECT: dict[str, Callable[[Object], Object]] = {
    "Deployment": _replicas,
    "StatefulSet": _replicas,
    "RoleScaler": _scaler,
    "Pod": _pod,
}


# --- parts ------------------------------------------------------------------------------------


def _map(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Object]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _pick(source: Object, names: Iterable[str]) -> Object:
    return {name: source[name] for name in names if name in source}


def _text(source: Object) -> Object:
    """Return the map with long texts cut to their ends."""
    return {
        name: value[-_LONGEST_TEXT:] if isinstance(value, str) else value
        for name, value in source.items()
    }
