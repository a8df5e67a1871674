"""Requests to the Kubernetes API as the pod's service account.

Only what the router needs of it: bounded answers, streams of lines, and errors that say what was
asked and why it failed. The token and the CA are files that the kubelet replaces while we run.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import msgspec
from msgspec import Struct

from penstock_router.errors import ConfigurationError, KubernetesError, KubernetesGarbage
from penstock_router.file_stamp import file_stamp

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""How long one answer, or the headers of a stream, may take. The API server itself answers within
a second or refuses."""
_MOST_ANSWER_BYTES = 64 * 1024 * 1024
"""Of one answer: a page of 250 pods is a few MiB."""
_MOST_LINE_BYTES = 4 * 1024 * 1024
"""Of one watch event: objects are at most 1.5 MiB in etcd."""
_MOST_TOLD_CHARACTERS = 500
"""Of a refusal's message in ours."""


class _Status(Struct):
    """The body of a refusal, `metav1.Status`."""

    message: str | None = None


class KubernetesApi:
    """The API server.

    Args:
        url: of the API server.
        credentials: directory with `token` and `ca.crt`, as a service account is mounted.
        answer_seconds: how long one answer may take.

    Raises:
        ConfigurationError: there is no token.
    """

    def __init__(
        self, url: str, credentials: Path, *, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self._url = url.rstrip("/")
        self._authority = credentials / "ca.crt"
        self._token = _Token(credentials / "token")
        self._seconds = answer_seconds

    def client(self) -> httpx.AsyncClient:
        """Return a new client, to be closed by its user.

        A client is made for each cycle of work, so that a connection that went bad and a CA that
        was replaced are both left behind. Raises KubernetesError if the CA cannot be read.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self._url.startswith("https:"):
            try:
                context.load_verify_locations(self._authority)
            except OSError as error:  # ssl.SSLError is one too
                raise KubernetesError(
                    f"the CA of the Kubernetes API, {self._authority}, is unusable: {error}"
                ) from error
        return httpx.AsyncClient(
            base_url=self._url,
            auth=self._token,
            verify=context,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=self._seconds),
            # Uncompressed, so that the limits below are those of what is received.
            headers={
                "accept": "application/json",
                "accept-encoding": "identity",
                "user-agent": "penstock-router",
            },
        )

    async def request(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        merge_patch: bytes | None = None,
    ) -> bytes:
        """Return the body of an answer. Raises KubernetesError, with the status of a refusal."""
        headers = {} if merge_patch is None else {"content-type": "application/merge-patch+json"}
        request = client.build_request(
            method, path, params=params, content=merge_patch, headers=headers
        )
        return await self._within_deadline(request, self._whole(client, request))

    @asynccontextmanager
    async def stream(
        self, client: httpx.AsyncClient, path: str, params: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Open a stream for reading with `lines`. Raises KubernetesError."""
        request = client.build_request("GET", path, params=params)
        response = await self._within_deadline(request, self._accepted(client, request))
        try:
            yield response
        finally:
            await response.aclose()

    async def _whole(self, client: httpx.AsyncClient, request: httpx.Request) -> bytes:
        response = await self._accepted(client, request)
        try:
            return await _read(response)
        finally:
            await response.aclose()

    async def _accepted(self, client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
        response = await client.send(request, stream=True)
        if response.is_success:
            return response
        try:
            told = _told(await _read(response)) or _phrase(response.status_code)
        finally:
            await response.aclose()
        raise KubernetesError(
            f"{_name(request)} was refused with {response.status_code}: {told}",
            status=response.status_code,
        )

    async def _within_deadline(self, request: httpx.Request, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._seconds):
                return await work
        except TimeoutError:
            raise KubernetesError(
                f"{_name(request)} was not answered within {self._seconds:g} s"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            raise KubernetesError(f"{_name(request)} failed: {_reason(error)}") from error


async def lines(response: httpx.Response, *, until: float) -> AsyncGenerator[bytes]:
    """Yield the lines of a stream until its end.

    Args:
        response: of `KubernetesApi.stream`.
        until: on the event loop's clock, when the server must have ended the stream by itself.

    Raises:
        KubernetesError: it has not, or the connection broke.
        KubernetesGarbage: a line is too long.
    """
    chunks = response.aiter_bytes()
    rest = b""
    while True:
        try:
            async with asyncio.timeout_at(until):
                chunk = await anext(chunks, b"")
        except TimeoutError:
            raise KubernetesError(
                f"{_name(response.request)} did not end when asked to; its connection is dead"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            raise KubernetesError(f"{_name(response.request)} broke: {_reason(error)}") from error
        if not chunk:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MOST_LINE_BYTES:
            raise KubernetesGarbage(
                f"{_name(response.request)}: a line is over {_MOST_LINE_BYTES} bytes"
            )
        for line in whole:
            if line:
                yield line


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Return `data` as a `kind`. Raises KubernetesGarbage if it is not one."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KubernetesGarbage(f"{what} is not as it should be: {error}") from error


class _Token(httpx.Auth):
    """The service account's token: read again when its file changes, and after a 401.

    A file that cannot be read keeps the last token: it is valid for an hour after its successor
    is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: object = None
        try:
            self._header = self._read()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the Kubernetes token {path} is unusable: {error}; the pod needs its service "
                "account mounted (automountServiceAccountToken: true), or give "
                "--kubernetes-credentials"
            ) from error

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request with the token; once more if a newer one is there by now."""
        self._refresh(force=False)
        sent = self._header
        request.headers["authorization"] = sent
        response = yield request
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            self._refresh(force=True)
            if self._header != sent:
                request.headers["authorization"] = self._header
                yield request

    def _refresh(self, *, force: bool) -> None:
        if force:
            self._stamp = None
        try:
            self._header = self._read()
        except (OSError, ValueError) as error:
            log.warning("the Kubernetes token stays as it was: %s", error)

    def _read(self) -> str:
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return self._header
        token = self._path.read_text(encoding="ascii").strip()
        if not token or not token.isprintable():
            raise ValueError(f"{self._path} holds no token")
        self._stamp = stamp
        return f"Bearer {token}"


async def _read(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _MOST_ANSWER_BYTES:
            raise KubernetesGarbage(
                f"{_name(response.request)}: the answer is over {_MOST_ANSWER_BYTES} bytes"
            )
        parts.append(part)
    return b"".join(parts)


def _told(body: bytes) -> str:
    """Return what a refusal says, empty if it does not say it as the API server does."""
    try:
        message = msgspec.json.decode(body, type=_Status).message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return (message or "")[:_MOST_TOLD_CHARACTERS]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason given"


def _name(request: httpx.Request) -> str:
    return f"{request.method} {request.url.copy_with(query=None)}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
