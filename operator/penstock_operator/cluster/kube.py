"""The verbs of the API that the operator uses. No write is possible without a valid lease."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from penstock_operator.cluster.kinds import kind_of
from penstock_operator.cluster.transport import APPLY, MERGE, METADATA_ONLY, Request, outcome
from penstock_operator.errors import ApiConflict, ApiMissing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_operator.cluster.kinds import Kind, Object
    from penstock_operator.cluster.transport import Transport

MANAGER = "penstock-operator"
"""Owner of the fields that are applied here."""
_REQUEST_SECONDS = 20.0
"""Longest request. An API server that takes longer is overloaded; waiting adds to it."""
PAGE = 250
"""Objects a LIST: about a megabyte, which neither side notices."""


class Guard(Protocol):
    """Says whether writing is allowed."""

    def write_seconds(self) -> float:
        """Return how long a write may take that begins now. Raises LeaseLost if none may."""
        ...


class Kube:
    """The API server. All methods raise ApiError; those that write raise LeaseLost as well."""

    def __init__(self, transport: Transport, guard: Guard) -> None:
        self._transport = transport
        self._guard = guard

    # --- reading ------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """Return an object, None if it does not exist."""
        try:
            return await self._read(Request("GET", kind.path(namespace, name)))
        except ApiMissing:
            return None

    async def pages(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        labels: str = "",
        metadata_only: bool = False,
    ) -> AsyncIterator[Object]:
        """Yield a LIST in pages, each with `items` and `metadata`."""
        accept = METADATA_ONLY if metadata_only else "application/json"
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = labels
        while True:
            page = await self._read(Request("GET", kind.path(namespace), query, accept=accept))
            yield page
            following = page.get("metadata", {}).get("continue")
            if not following:
                return
            query["continue"] = following

    async def select(self, kind: Kind, namespace: str, *, fields: str, limit: int) -> list[Object]:
        """Return at most `limit` objects that a field selector selects."""
        query = {"fieldSelector": fields, "limit": str(limit)}
        found = await self._read(Request("GET", kind.path(namespace), query))
        return list(found.get("items") or [])

    # --- writing ------------------------------------------------------------------------------

    async def apply(self, obj: Object, subresource: str = "") -> Object:
        """Apply on the server: the object then has these fields, others stay with their owners."""
        meta = obj["metadata"]
        path = kind_of(obj).path(meta["namespace"], meta["name"], subresource)
        query = {"fieldManager": MANAGER, "force": "true"}
        return await self._write(Request("PATCH", path, query, obj, APPLY))

    async def create(self, obj: Object) -> Object | None:
        """Create an object. Return None if one of this name exists already."""
        path = kind_of(obj).path(obj["metadata"]["namespace"])
        try:
            return await self._write(Request("POST", path, {"fieldManager": MANAGER}, obj))
        except ApiConflict:
            return None

    async def merge(
        self, kind: Kind, namespace: str, name: str, change: Object, subresource: str = ""
    ) -> Object:
        """Change the given fields only. With `metadata.uid` in it, only of the object meant."""
        path = kind.path(namespace, name, subresource)
        return await self._write(Request("PATCH", path, {"fieldManager": MANAGER}, change, MERGE))

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> Object | None:
        """Delete the object with this uid; what it owns goes in the background.

        Return what the API says of it, None if it is not there any more.
        """
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            return await self._write(Request("DELETE", kind.path(namespace, name), body=body))
        except (ApiMissing, ApiConflict):
            return None

    async def _read(self, request: Request) -> Object:
        return outcome(await self._transport.send(request, _REQUEST_SECONDS))

    async def _write(self, request: Request) -> Object:
        seconds = min(_REQUEST_SECONDS, self._guard.write_seconds())
        return outcome(await self._transport.send(request, seconds))
