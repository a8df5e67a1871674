"""The memory of objects never goes back in time, and keeps what a reconcile reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from penstock_operator import labels
from penstock_operator.cluster import kinds
from penstock_operator.cluster.children import Children, child_of

if TYPE_CHECKING:
    from penstock_operator.cluster.kinds import Object

KEY = ("default", "chat")


def pod(version: int, *, uid: str = "u", name: str = "p", **status: Any) -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {labels.SERVICE: "chat"},
            "managedFields": [{"manager": "x"}],
        },
        "status": {"phase": "Running", **status},
    }


def test_only_what_a_reconcile_would_see_differently_is_a_change() -> None:
    children = Children()
    assert children.put(kinds.POD, pod(1)) == KEY
    assert children.put(kinds.POD, pod(2, qosClass="Guaranteed")) is None
    assert children.put(kinds.POD, pod(3, podIP="10.0.0.1")) == KEY


def test_an_older_version_never_replaces_a_newer_one() -> None:
    children = Children()
    children.put(kinds.POD, pod(5, podIP="new"))
    assert children.put(kinds.POD, pod(4, podIP="old")) is None
    assert children.of(KEY)["Pod", "p"].status["podIP"] == "new"


def test_what_was_deleted_stays_deleted() -> None:
    children = Children()
    children.put(kinds.POD, pod(1))
    assert children.remove(kinds.POD, KEY, "p", "u")
    assert children.put(kinds.POD, pod(9)) is None
    assert children.of(KEY) == {}
    assert children.services() == []


def test_the_deletion_of_a_predecessor_does_not_remove_its_successor() -> None:
    children = Children()
    children.put(kinds.POD, pod(1, uid="old"))
    children.put(kinds.POD, pod(2, uid="new"))
    assert not children.remove(kinds.POD, KEY, "p", "old")
    assert children.of(KEY)["Pod", "p"].uid == "new"


def test_objects_of_nobody_are_passed_over() -> None:
    orphan = pod(1)
    del orphan["metadata"]["labels"]
    children = Children()
    assert children.put(kinds.POD, orphan) is None
    assert children.put(kinds.POD, {"metadata": None}) is None
    assert children.count() == 0


def test_a_signature_changes_with_what_was_asked_for_and_not_with_what_was_observed() -> None:
    def deployment(generation: int, version: str, **more: Any) -> Object:
        meta = {"name": "d", "uid": "u", "generation": generation, "resourceVersion": version}
        return {"metadata": {**meta, **more}, "spec": {"replicas": 2}, "status": {}}

    first = child_of(kinds.DEPLOYMENT, deployment(1, "1"))
    assert child_of(kinds.DEPLOYMENT, deployment(1, "2")) == first
    assert child_of(kinds.DEPLOYMENT, deployment(2, "3")).signature != first.signature
    edited = child_of(kinds.DEPLOYMENT, deployment(1, "4", labels={"a": "b"}))
    assert edited.signature != first.signature


def test_long_messages_keep_their_end() -> None:
    told = "x" * 5000 + "the cause"
    ended = {"state": {"terminated": {"exitCode": 1, "message": told}}, "name": "worker"}
    child = child_of(kinds.POD, pod(1, containerStatuses=[ended]))
    kept = child.status["containerStatuses"][0]["state"]["terminated"]["message"]
    assert kept.endswith("the cause")
    assert len(kept) == 1024


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "metadata",
                    "spec",
                    "status",
                    "labels",
                    "annotations",
                    "ownerReferences",
                    "conditions",
                    "type",
                    "state",
                    "containerStatuses",
                    "containers",
                    "volumes",
                    "name",
                    "uid",
                    "lastState",
                    "terminated",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), json))
def test_any_json_can_be_kept(obj: Object) -> None:
    for kind in kinds.WATCHED:
        child_of(kind, obj)
        Children().put(kind, obj)
