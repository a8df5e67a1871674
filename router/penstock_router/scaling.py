"""The scale of a role as the Kubernetes API has it: read, and raised from zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec
from msgspec import Struct, field

from penstock_router.kubernetes_api import decode

if TYPE_CHECKING:
    from penstock_router.kubernetes_api import KubernetesApi


class Scale(Struct, frozen=True):
    """What a scaler says."""

    replicas: int
    version: str
    """A write that names it fails if somebody else wrote in between."""


class Scales(Protocol):
    """Scalers by name. Both methods raise KubernetesError."""

    async def read(self, name: str) -> Scale:
        """Return the scale."""
        ...

    async def write(self, name: str, replicas: int, *, version: str) -> None:
        """Set the scale, unless it is not that of `version` any more (status 409)."""
        ...


class _Metadata(Struct):
    version: str | None = field(name="resourceVersion", default=None)


class _Spec(Struct, frozen=True):
    replicas: int = 0
    """Left out of the JSON when it is 0."""


class _Scale(Struct):
    metadata: _Metadata
    spec: _Spec = _Spec()


class RoleScalers:
    """The RoleScaler resources of a namespace, through their `/scale`.

    Args:
        api: the API server.
        namespace: of the service.
    """

    def __init__(self, api: KubernetesApi, namespace: str) -> None:
        self._api = api
        self._path = f"/apis/penstock.dev/v1alpha1/namespaces/{namespace}/rolescalers"

    async def read(self, name: str) -> Scale:
        """Return the scale of a role. Raises KubernetesError."""
        async with self._api.client() as client:
            body = await self._api.request(client, "GET", f"{self._path}/{name}/scale")
        found = decode(body, _Scale, f"the scale of {name}")
        return Scale(found.spec.replicas, found.metadata.version or "")

    async def write(self, name: str, replicas: int, *, version: str) -> None:
        """Set the scale of a role. Raises KubernetesError, with 409 if it is not `version`."""
        patch = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        async with self._api.client() as client:
            await self._api.request(
                client,
                "PATCH",
                f"{self._path}/{name}/scale",
                merge_patch=msgspec.json.encode(patch),
            )
