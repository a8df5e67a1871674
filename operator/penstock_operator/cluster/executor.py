"""Changes objects: applies what is wanted, scales and deletes what the planner says, prunes.

An object is applied only if what is wanted of it changed, or if somebody changed it since it was
applied. The first is told by a hash that the object carries in an annotation, so a restarted
operator writes nothing; the second by its generation (or version), labels and owners. Answers go
into `Children` at once, so that the next reconcile sees them before the watch tells.

What the API refuses for good does not keep the rest from being done: refusals are collected in the
`Scene`. Every other error ends the reconcile, which is tried again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock_operator import labels, manifests, podspec
from penstock_operator.cluster.children import child_of, digest
from penstock_operator.cluster.kinds import (
    DEPLOYMENT,
    POD,
    SCALER,
    SECRET,
    SHARED,
    STATEFUL_SET,
    kind_of,
)
from penstock_operator.cluster.observation import (
    group_index,
    pods_of,
    workload_children,
)
from penstock_operator.cluster.pods import role_of, state_of, workload_name
from penstock_operator.errors import ApiConflict, ApiMissing, ApiRefused
from penstock_operator.planner import Create, Delete, Scale
from penstock_wire.keys import PUBLIC_FILE, SECRET_FILE, Keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock_operator.api import InferenceService
    from penstock_operator.cluster.children import Child, ChildId, Children
    from penstock_operator.cluster.kinds import Key, Kind, Object
    from penstock_operator.cluster.kube import Kube
    from penstock_operator.cluster.pods import WorkerAnswer
    from penstock_operator.planner import Action

log = logging.getLogger(__name__)

_INVALID = 422
"""HTTP status of an object that cannot be."""


@dataclass(frozen=True, slots=True)
class _Applied:
    """An object as it was when it was applied last."""

    wanted: str
    uid: str
    signature: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One service at the moment of a reconcile."""

    service: InferenceService
    uid: str
    children: Mapping[ChildId, Child]
    revisions: Mapping[labels.Role, str]
    """The newest one of each role."""
    full: bool = False
    """Apply everything, whatever the memory says."""
    loads: Mapping[str, WorkerAnswer] = field(default_factory=dict)
    """What workers said, by the pod's uid."""
    refusals: list[ApiRefused] = field(default_factory=list)
    """What the API refused in this reconcile."""

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.service.metadata.namespace, self.service.name

    @property
    def inputs(self) -> manifests.Inputs:
        """What rendering needs beside the spec."""
        owner = {
            "apiVersion": self.service.api_version,
            "kind": self.service.kind,
            "name": self.service.name,
            "uid": self.uid,
            "controller": True,
        }
        return manifests.Inputs(owner=owner)


class Executor:
    """Does what was decided. All methods raise ApiError and LeaseLost."""

    def __init__(self, kube: Kube, children: Children) -> None:
        self._kube = kube
        self._children = children
        self._applied: dict[Key, dict[ChildId, _Applied]] = {}

    def forget(self, key: Key) -> None:
        """Forget a service that is gone."""
        self._applied.pop(key, None)

    # --- objects there is one of --------------------------------------------------------------

    async def apply_shared(self, scene: Scene) -> None:
        """Apply the objects that all revisions share, and delete those that are not wanted."""
        wanted: set[ChildId] = set()
        created = await self._create_scalers(scene)
        for obj in (
            *manifests.shared_objects(scene.service, scene.inputs),
            *manifests.role_scalers(scene.service, scene.inputs, new=False),
        ):
            own = (obj["kind"], obj["metadata"]["name"])
            wanted.add(own)
            if own not in created:
                await self._apply(scene, obj)
        kinds = {kind.name: kind for kind in SHARED}
        for (kind, name), child in scene.children.items():
            ours = kind in kinds and child.owner == scene.uid
            if ours and not child.deleting and (kind, name) not in wanted:
                await self._delete(scene.key, kinds[kind], child)

    async def create_keys(self, scene: Scene) -> None:
        """Create the Secret with the service's key pair, unless it is there already.

        It is never read: the operator has no right to, and nothing to learn from it.
        """
        pair = Keys.generate()
        entries = {PUBLIC_FILE: pair.public.decode(), SECRET_FILE: pair.secret.decode()}
        inputs = manifests.Inputs(keys=entries, owner=scene.inputs.owner)
        for obj in manifests.shared_objects(scene.service, inputs):
            if obj["kind"] == SECRET.name and await self._create(scene, obj) is not None:
                log.info("created the Secret %s", obj["metadata"]["name"])

    async def _create_scalers(self, scene: Scene) -> set[ChildId]:
        """Create RoleScalers with their first number; afterwards the number is not ours.

        Return those that were created.

        They are created, not applied: a number once applied would be taken away by applying
        without it.
        """
        made: set[ChildId] = set()
        wanted = manifests.role_scalers(scene.service, scene.inputs, new=False)
        for obj, as_applied in zip(
            manifests.role_scalers(scene.service, scene.inputs, new=True), wanted, strict=True
        ):
            name = obj["metadata"]["name"]
            if (SCALER.name, name) in scene.children:
                continue
            mark = _wanted(as_applied)
            created = await self._create(scene, _marked(obj, mark))
            if created is not None:
                self._children.put(SCALER, created)
                self._remember(scene, SCALER, created, mark)
                made.add((SCALER.name, name))
        return made

    async def put_to_sleep(self, scene: Scene, role: labels.Role) -> None:
        """Scale a role to zero, unless somebody changed its scaler meanwhile."""
        child = scene.children[SCALER.name, podspec.scaler_name(scene.service, role)]
        version = self._children.version(child.uid)
        change = {"metadata": {"resourceVersion": str(version)}, "spec": {"replicas": 0}}
        try:
            await self._kube.merge(SCALER, scene.key[0], child.name, change, "scale")
        except ApiConflict:
            log.info("%s changed meanwhile and is not put to sleep", child.name)
        else:
            log.info("%s has been idle and is scaled to zero", child.name)

    async def report_scalers(self, scene: Scene, counts: Mapping[labels.Role, int]) -> None:
        """Tell autoscalers what runs, where that is not what the scalers say."""
        for role in labels.ROLES:
            name = podspec.scaler_name(scene.service, role)
            child = scene.children.get((SCALER.name, name))
            selector = f"{labels.SERVICE}={scene.service.name},{labels.ROLE}={role}"
            status = {"replicas": counts[role], "selector": selector}
            if child is None or child.deleting or child.status == status:
                continue
            metadata = {"name": name, "namespace": scene.key[0], "uid": child.uid}
            told = await self._kube.apply(
                {
                    "apiVersion": SCALER.api_version,
                    "kind": SCALER.name,
                    "metadata": metadata,
                    "status": status,
                },
                "status",
            )
            self._children.put(SCALER, told)

    # --- workloads ----------------------------------------------------------------------------

    async def carry_out(self, scene: Scene, actions: Sequence[Action]) -> bool:
        """Do what the planner says, and repair workloads of the newest revision.

        Return whether something was done that the planner asked for.
        """
        acted = False
        if any(isinstance(action, Create) for action in actions):
            await self.create_keys(scene)
        touched = set()
        for action in actions:
            match action:
                case Create(role, replicas, index):
                    obj = _render(scene, role, replicas, index)
                    if _is_deleting(scene, obj):
                        continue  # its event wakes the service once it is gone
                    log.info("create %s with %d replicas", obj["metadata"]["name"], replicas)
                    await self._apply(scene, obj, force=True)
                case Scale(name, replicas):
                    touched.add(name)
                    await self._scale(scene, scene.children[DEPLOYMENT.name, name], replicas)
                case Delete(name):
                    touched.add(name)
                    await self._delete_workload(scene, name)
            acted = True
        for child in workload_children(scene.children):
            newest = None if child.name in touched else _newest(scene, child)
            if newest is not None:
                await self._apply(scene, newest)
        return acted

    async def _scale(self, scene: Scene, child: Child, replicas: int) -> None:
        """Ask for other replicas; of an older revision nothing else is known, nor changed."""
        log.info("scale %s to %d", child.name, replicas)
        if replicas < int(child.spec.get("replicas") or 0):
            await self._mark_costs(scene, child)
        newest = _newest(scene, child, replicas)
        if newest is not None:
            await self._apply(scene, newest, force=True)
            return
        change = {"metadata": {"uid": child.uid}, "spec": {"replicas": replicas}}
        found = await self._kube.merge(DEPLOYMENT, scene.key[0], child.name, change)
        self._children.put(DEPLOYMENT, found)

    async def _mark_costs(self, scene: Scene, child: Child) -> None:
        """Have the Deployment's controller take the decode workers with the least work first."""
        if role_of(child) != "decode":
            return
        for pod in pods_of(scene.children):
            answer = scene.loads.get(pod.uid)
            if workload_name(pod) != child.name or state_of(pod) != "ready" or answer is None:
                continue
            cost = str(answer.load)
            if pod.body["metadata"]["annotations"].get(labels.DELETION_COST) == cost:
                continue
            change = {"metadata": {"uid": pod.uid, "annotations": {labels.DELETION_COST: cost}}}
            try:
                marked = await self._kube.merge(POD, scene.key[0], pod.name, change)
            except (ApiMissing, ApiConflict):
                continue  # it is gone, and its work with it
            self._children.put(POD, marked)

    async def _delete_workload(self, scene: Scene, name: str) -> None:
        for kind in (STATEFUL_SET, DEPLOYMENT):
            child = scene.children.get((kind.name, name))
            if child is not None:
                log.info("delete %s", name)
                await self._delete(scene.key, kind, child)

    # --- any object ---------------------------------------------------------------------------

    async def _apply(self, scene: Scene, obj: Object, *, force: bool = False) -> None:
        kind, name = kind_of(obj), obj["metadata"]["name"]
        wanted = _wanted(obj)
        memory = self._applied.setdefault(scene.key, {})
        child = scene.children.get((kind.name, name))
        known = memory.get((kind.name, name))
        if child is not None and not force and not scene.full:
            if known is None and child.applied == wanted:
                known = _Applied(wanted, child.uid, child.signature)
                memory[kind.name, name] = known
            if known == _Applied(wanted, child.uid, child.signature):
                return
        try:
            found = await self._assert(_marked(obj, wanted), exists=child is not None)
        except ApiRefused as error:
            scene.refusals.append(error)
            return
        self._children.put(kind, found)
        self._remember(scene, kind, found, wanted)

    def _remember(self, scene: Scene, kind: Kind, found: Object, wanted: str) -> None:
        """Note an object as it is now that it was applied or created."""
        seen = child_of(kind, found)
        memory = self._applied.setdefault(scene.key, {})
        memory[kind.name, seen.name] = _Applied(wanted, seen.uid, seen.signature)

    async def _assert(self, obj: Object, *, exists: bool) -> Object:
        """Apply an object, over what somebody has made of it if need be.

        An apply merges lists by their keys and keeps the items of others. Where both together are
        impossible (two ports of one name), whole lists are put in place of theirs first.
        """
        try:
            return await self._kube.apply(obj)
        except ApiRefused as error:
            if not exists or error.status != _INVALID:
                raise
            meta = obj["metadata"]
            change = {k: v for k, v in obj.items() if k not in ("apiVersion", "kind", "metadata")}
            try:
                await self._kube.merge(kind_of(obj), meta["namespace"], meta["name"], change)
            except ApiRefused:
                raise error from None
            return await self._kube.apply(obj)

    async def _create(self, scene: Scene, obj: Object) -> Object | None:
        try:
            return await self._kube.create(obj)
        except ApiRefused as error:
            scene.refusals.append(error)
            return None

    async def _delete(self, key: Key, kind: Kind, child: Child) -> None:
        found = await self._kube.delete(kind, key[0], child.name, child.uid)
        self._applied.get(key, {}).pop((kind.name, child.name), None)
        if found is not None and found.get("kind") != "Status" and _lingers(found):
            self._children.put(kind, found)
        else:
            self._children.remove(kind, key, child.name, child.uid)


def _wanted(obj: Object) -> str:
    """Return the hash of what is wanted of an object, whatever its number of replicas."""
    spec = obj.get("spec")
    if obj["kind"] != DEPLOYMENT.name or not isinstance(spec, dict):
        return digest(obj)
    return digest({**obj, "spec": {k: v for k, v in spec.items() if k != "replicas"}})


def _marked(obj: Object, wanted: str) -> Object:
    """Return the object with the hash of what is wanted of it."""
    annotations = {**obj["metadata"].get("annotations", {}), labels.APPLIED: wanted}
    return {**obj, "metadata": {**obj["metadata"], "annotations": annotations}}


def _render(scene: Scene, role: labels.Role, replicas: int, index: int) -> Object:
    if role == "prefill":
        return manifests.prefill_group(scene.service, index, scene.inputs)
    return manifests.deployment(scene.service, role, replicas, scene.inputs)


def _newest(scene: Scene, child: Child, replicas: int | None = None) -> Object | None:
    """Return the object as it is wanted, None if it is of an older revision."""
    role = role_of(child)
    if role is None or scene.service.spec.role(role) is None:
        return None
    if child.labels.get(labels.REVISION) != scene.revisions[role]:
        return None
    if replicas is None:
        replicas = int(child.spec.get("replicas") or 0)
    obj = _render(scene, role, replicas, group_index(child.labels.get(labels.GROUP, "")))
    return obj if obj["metadata"]["name"] == child.name else None


def _is_deleting(scene: Scene, obj: Object) -> bool:
    child = scene.children.get((obj["kind"], obj["metadata"]["name"]))
    return child is not None and child.deleting


def _lingers(obj: Object) -> bool:
    metadata = obj.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("finalizers"))
