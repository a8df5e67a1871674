"""Requests to the API server as plain data, and the errors that answers stand for.

`Transport` is what does the I/O: `connect.KubeTransport` in a cluster, a fake in tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from penstock_operator.errors import (
    ApiConflict,
    ApiError,
    ApiMissing,
    ApiRefused,
    ApiUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock_operator.cluster.kinds import Object

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    content_type: str = "application/json"
    accept: str = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and the JSON object behind it."""

    status: int
    body: Object
    request: Request


class Transport(Protocol):
    """Sends requests. Any status is an answer; only the absence of one is an error."""

    async def send(self, request: Request, seconds: float) -> Answer:
        """Return the answer. Raises ApiUnavailable if there is none within `seconds`."""
        ...


def outcome(answer: Answer) -> Object:
    """Return the body of an answer that is a success. Raises ApiError for every other."""
    if answer.status < 400:
        return answer.body
    message = answer.body.get("message")
    cause = f"{answer.request.method} {answer.request.path}: {message or answer.status}"
    raise _error(answer.status)(cause, status=answer.status)


def _error(status: int) -> type[ApiError]:
    if status == 404:
        return ApiMissing
    if status == 409:
        return ApiConflict
    if status in (401, 408, 429) or status >= 500:
        return ApiUnavailable
    return ApiRefused
