"""A small API server in memory, with the semantics that the operator relies on.

Server-side apply with ownership of fields, generations and resourceVersions that move only with a
change, subresources, preconditions, garbage collection by owner references, RBAC by the operator's
own rules, and failures on demand. Lists are atomic values.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock_operator.cluster import kinds, rbac
from penstock_operator.cluster.transport import APPLY, MERGE, Answer, Request
from penstock_operator.errors import ApiUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_operator.cluster.kinds import Kind, Object

Path: TypeAlias = tuple[str, ...]
Id: TypeAlias = tuple[str, str, str]
"""Plural, namespace, name."""

_KINDS = {
    (kind.group, kind.plural): kind
    for kind in (*kinds.WATCHED, kinds.SERVICE, kinds.SECRET, kinds.EVENT, kinds.LEASE)
}
_GENERATION = frozenset(
    {
        "deployments",
        "statefulsets",
        "inferenceservices",
        "rolescalers",
        "networkpolicies",
        "poddisruptionbudgets",
    }
)
_STATUS = frozenset({*_GENERATION, "pods"})


@dataclass
class Stored:
    kind: Kind
    obj: Object
    owners: dict[tuple[str, str], set[Path]] = field(default_factory=dict)
    """Paths of the fields that each (manager, operation) owns."""


@dataclass(frozen=True)
class Target:
    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def id(self) -> Id:
        return self.kind.plural, self.namespace, self.name


class FakeApi:
    """Implements `transport.Transport`. Watch events go to `events`."""

    def __init__(self) -> None:
        self.stored: dict[Id, Stored] = {}
        self.events: list[tuple[Kind, str, Object]] = []
        self.calls: list[tuple[str, str]] = []
        """Verb and resource/subresource of each call."""
        self.writes: list[tuple[str, str, str]] = []
        """Verb, resource and name of the calls that changed something."""
        self.fail: Callable[[Request], str | None] = lambda request: None
        """Returns None, "before" (nothing happens) or "after" (it happens, the answer is lost)."""
        self.refuse: Callable[[Request], tuple[int, str] | None] = lambda request: None
        self.enforce_rbac = True
        self._version = 0
        self._uids = 0

    # --- the transport ------------------------------------------------------------------------

    async def send(self, request: Request, seconds: float) -> Answer:
        assert seconds > 0
        how = self.fail(request)
        if how == "before":
            raise ApiUnavailable(f"{request.method} {request.path}: injected")
        status, body = self._handle(request)
        if how == "after":
            raise ApiUnavailable(f"{request.method} {request.path}: the answer is lost")
        return Answer(status, copy.deepcopy(body), request)

    def _handle(self, request: Request) -> tuple[int, Object]:
        target = parse_path(request.path)
        verb = _verb(request, target)
        resource = "/".join(filter(None, (target.kind.plural, target.subresource)))
        self.calls.append((verb, resource))
        if refusal := self.refuse(request):
            return refusal[0], {"message": refusal[1]}
        if not self._allowed(target, resource, verb):
            return 403, {"message": f"cannot {verb} {resource}"}
        handle = {
            "get": self._get,
            "list": self._list,
            "create": self._create,
            "update": self._update,
            "apply": self._apply,
            "merge": self._merge,
            "delete": self._delete,
        }
        kinds_of_patch = {APPLY: "apply", MERGE: "merge"}
        return handle[kinds_of_patch[request.content_type] if verb == "patch" else verb](
            target, request
        )

    def _allowed(self, target: Target, resource: str, verb: str) -> bool:
        if not self.enforce_rbac:
            return True
        rules = (*rbac.CLUSTER_RULES, *rbac.LEASE_RULES)
        return rbac.allows(rules, group=target.kind.group, resource=resource, verb=verb)

    # --- what tests do ------------------------------------------------------------------------

    def put(self, kind: Kind, obj: Object, manager: str = "test") -> Object:
        """Create or replace an object as somebody else."""
        key = (kind.plural, obj["metadata"]["namespace"], obj["metadata"]["name"])
        before = self.stored.get(key)
        stored = before or Stored(kind, self._new(kind, obj))
        changed = copy.deepcopy(obj)
        changed["metadata"] = {**stored.obj["metadata"], **changed["metadata"]}
        stored.owners.setdefault((manager, "Update"), set()).update(_leaves(obj))
        return self._store(key, stored, changed, created=before is None)

    def change(self, id_: Id, change: Callable[[Object], Any], manager: str = "test") -> Object:
        """Edit an object as somebody else does."""
        stored = self.stored[id_]
        changed = copy.deepcopy(stored.obj)
        change(changed)
        before, after = _leaves(stored.obj), _leaves(changed)
        touched = {path for path in after if before.get(path) != after[path]}
        for paths in stored.owners.values():
            paths.difference_update(touched)
        stored.owners.setdefault((manager, "Update"), set()).update(touched)
        return self._store(id_, stored, changed)

    def remove(self, id_: Id) -> None:
        """Delete an object and, as the garbage collector, what it owns."""
        stored = self.stored.pop(id_, None)
        if stored is None:
            return
        self._version += 1
        last = copy.deepcopy(stored.obj)
        last["metadata"]["resourceVersion"] = str(self._version)
        self.events.append((stored.kind, "DELETED", last))
        uid = stored.obj["metadata"]["uid"]
        for other, child in list(self.stored.items()):
            owners = child.obj["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == uid for owner in owners):
                if child.kind is kinds.POD and other in self.stored:
                    self.terminate(other)
                else:
                    self.remove(other)

    def terminate(self, id_: Id) -> None:
        """Begin the graceful end of a pod."""

        def mark(obj: Object) -> None:
            obj["metadata"].setdefault("deletionTimestamp", "2030-01-01T00:00:00Z")

        self.change(id_, mark, "kubelet")

    def of(self, kind: Kind) -> list[Object]:
        return [s.obj for key, s in sorted(self.stored.items()) if s.kind is kind]

    def get(self, kind: Kind, name: str, namespace: str = "default") -> Object:
        return self.stored[kind.plural, namespace, name].obj

    def counted(self) -> Counter[tuple[str, str]]:
        return Counter(self.calls)

    # --- verbs --------------------------------------------------------------------------------

    def _get(self, target: Target, request: Request) -> tuple[int, Object]:
        found = self.stored.get(target.id)
        return (200, found.obj) if found else _missing(target)

    def _list(self, target: Target, request: Request) -> tuple[int, Object]:
        selector = request.query.get("labelSelector", "")
        fields = request.query.get("fieldSelector", "")
        found = [
            stored.obj
            for (plural, namespace, _), stored in sorted(self.stored.items())
            if plural == target.kind.plural
            and target.namespace in ("", namespace)
            and (not selector or selector in stored.obj["metadata"].get("labels", {}))
            and (not fields or _field(stored.obj, fields))
        ]
        start = int(request.query.get("continue", 0))
        limit = int(request.query.get("limit", 500))
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        return 200, {"items": found[start : start + limit], "metadata": more}

    def _create(self, target: Target, request: Request) -> tuple[int, Object]:
        obj = request.body
        key = (target.kind.plural, target.namespace, obj["metadata"]["name"])
        if key in self.stored:
            return 409, {"message": f"{key[2]} already exists"}
        stored = Stored(target.kind, self._new(target.kind, obj))
        manager = request.query.get("fieldManager", "unknown")
        stored.owners[manager, "Update"] = set(_leaves(obj))
        self.writes.append(("create", target.kind.plural, key[2]))
        return 201, self._store(key, stored, stored.obj, created=True)

    def _update(self, target: Target, request: Request) -> tuple[int, Object]:
        stored = self.stored.get(target.id)
        if stored is None:
            return _missing(target)
        asked = request.body["metadata"].get("resourceVersion")
        if asked != stored.obj["metadata"]["resourceVersion"]:
            return 409, {"message": "the object has been modified"}
        self.writes.append(("update", target.kind.plural, target.name))
        return 200, self._store(target.id, stored, copy.deepcopy(request.body))

    def _apply(self, target: Target, request: Request) -> tuple[int, Object]:
        body = request.body
        stored = self.stored.get(target.id)
        created = stored is None
        if stored is None:
            if target.subresource:
                return _missing(target)
            self.calls.append(("create", target.kind.plural))
            if not self._allowed(target, target.kind.plural, "create"):
                return 403, {"message": f"cannot create {target.kind.plural}"}
            stored = Stored(target.kind, self._new(target.kind, {"metadata": body["metadata"]}))
        if problem := _conflict(body, stored.obj):
            return problem
        own = (request.query["fieldManager"], f"Apply {target.subresource}")
        leaves = _leaves(body)
        kept = {p: v for p, v in leaves.items() if (p[0] == "status") == bool(target.subresource)}
        changed = self._own(stored, own, kept)
        changed = {**{k: body[k] for k in ("apiVersion", "kind")}, **changed}
        stored.owners[own] = set(kept)
        before = self._version
        answer = self._store(target.id, stored, changed, created=created)
        if self._version != before:
            self.writes.append(("apply", _resource(target), target.name))
        return (201 if created else 200), answer

    @staticmethod
    def _own(stored: Stored, own: tuple[str, str], kept: dict[Path, Any]) -> Object:
        """Return the object with these fields, and without those that nobody owns any more."""
        changed = copy.deepcopy(stored.obj)
        others = [paths for who, paths in stored.owners.items() if who != own]
        for path in stored.owners.get(own, set()) - kept.keys():
            if not any(path in paths for paths in others):
                _unset(changed, path)
        for path, value in kept.items():
            if _value(changed, path) != value:
                for paths in others:
                    paths.discard(path)
            _set(changed, path, value)
        return changed

    def _merge(self, target: Target, request: Request) -> tuple[int, Object]:
        stored = self.stored.get(target.id)
        if stored is None:
            return _missing(target)
        meta = request.body.get("metadata", {})
        for name in ("uid", "resourceVersion"):
            if name in meta and meta[name] != stored.obj["metadata"][name]:
                return 409, {"message": f"the {name} is another one"}
        given = {p: v for p, v in _leaves(request.body).items() if p[-1] != "resourceVersion"}
        changed = copy.deepcopy(stored.obj)
        manager = (request.query["fieldManager"], "Update")
        for path, value in given.items():
            for paths in stored.owners.values():
                paths.discard(path)
            stored.owners.setdefault(manager, set()).add(path)
            _set(changed, path, value)
        self.writes.append(("patch", _resource(target), target.name))
        answer = self._store(target.id, stored, changed)
        return 200, ({"kind": "Scale"} if target.subresource == "scale" else answer)

    def _delete(self, target: Target, request: Request) -> tuple[int, Object]:
        stored = self.stored.get(target.id)
        if stored is None:
            return _missing(target)
        if request.body["preconditions"]["uid"] != stored.obj["metadata"]["uid"]:
            return 409, {"message": "the uid is another one"}
        assert request.body["propagationPolicy"] == "Background"
        self.writes.append(("delete", target.kind.plural, target.name))
        self.remove(target.id)
        return 200, {"kind": "Status", "status": "Success"}

    # --- storage ------------------------------------------------------------------------------

    def _new(self, kind: Kind, obj: Object) -> Object:
        self._uids += 1
        new = copy.deepcopy(obj)
        new["metadata"]["uid"] = f"uid-{self._uids}"
        new["metadata"].setdefault("creationTimestamp", "2030-01-01T00:00:00Z")
        if kind.plural in _GENERATION:
            new["metadata"]["generation"] = 0
        return new

    def _store(self, id_: Id, stored: Stored, changed: Object, *, created: bool = False) -> Object:
        if not created and _without_version(changed) == _without_version(stored.obj):
            return stored.obj
        meta = changed["metadata"]
        if stored.kind.plural in _GENERATION and (
            created or changed.get("spec") != stored.obj.get("spec")
        ):
            meta["generation"] = stored.obj["metadata"]["generation"] + 1
        self._version += 1
        meta["resourceVersion"] = str(self._version)
        stored.obj = changed
        self.stored[id_] = stored
        kind = "ADDED" if created else "MODIFIED"
        self.events.append((stored.kind, kind, copy.deepcopy(changed)))
        return changed


# --- parts ------------------------------------------------------------------------------------


def parse_path(path: str) -> Target:
    parts = path.strip("/").split("/")
    group = "" if parts[0] == "api" else parts[1]
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    rest = [*rest, "", "", ""]
    return Target(_KINDS[group, rest[0]], namespace, rest[1], rest[2])


def _conflict(body: Object, stored: Object) -> tuple[int, Object] | None:
    uid = body["metadata"].get("uid")
    if uid is not None and uid != stored["metadata"]["uid"]:
        return 409, {"message": "the uid is another one"}
    before, wanted = (
        {ref["uid"] for ref in obj["metadata"].get("ownerReferences", []) if ref["controller"]}
        for obj in (stored, body)
    )
    if wanted and before - wanted:
        return 422, {"message": "only one reference can have controller set to true"}
    return None


def _resource(target: Target) -> str:
    return "/".join(filter(None, (target.kind.plural, target.subresource)))


def _verb(request: Request, target: Target) -> str:
    if request.method == "GET":
        return "get" if target.name else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]


def _missing(target: Target) -> tuple[int, Object]:
    return 404, {"message": f'{target.kind.plural} "{target.name}" not found'}


def _field(obj: Object, selector: str) -> bool:
    path, _, wanted = selector.partition("=")
    return bool(_value(obj, tuple(path.split("."))) == wanted)


def _without_version(obj: Object) -> Object:
    meta = {k: v for k, v in obj["metadata"].items() if k not in ("resourceVersion", "generation")}
    return {**obj, "metadata": meta}


_IDENTITY = {
    ("apiVersion",),
    ("kind",),
    ("metadata", "name"),
    ("metadata", "namespace"),
    ("metadata", "uid"),
    ("metadata", "resourceVersion"),
    ("metadata", "generation"),
    ("metadata", "creationTimestamp"),
}


def _leaves(obj: Object, path: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for name, value in obj.items():
        here = (*path, name)
        if here in _IDENTITY:
            continue
        if isinstance(value, dict) and value:
            found.update(_leaves(value, here))
        else:
            found[here] = value
    return found


def _value(obj: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(obj, dict) or name not in obj:
            return None
        obj = obj[name]
    return obj


def _set(obj: Object, path: Path, value: Any) -> None:
    for name in path[:-1]:
        obj = obj.setdefault(name, {})
    obj[path[-1]] = copy.deepcopy(value)


def _unset(obj: Object, path: Path) -> None:
    parents = [obj]
    for name in path[:-1]:
        obj = obj.get(name, {})
        parents.append(obj)
    obj.pop(path[-1], None)
    for parent, name in zip(reversed(parents[:-1]), reversed(path[:-1]), strict=True):
        if not parent.get(name):
            parent.pop(name, None)
