"""A Kubernetes API server on loopback: LIST and WATCH of pods, and /scale of RoleScalers.

It speaks real HTTP over real sockets, keeps versions as etcd does, and misbehaves when told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAMESPACE = "tests"
SERVICE = "penstock.dev/service=chat"


def pod(name: str, role: str = "decode", *, ip: str = "127.0.0.1", **labels: str) -> dict[str, Any]:
    """A pod as the API server tells it, with fields that nobody reads."""
    found = {"penstock.dev/service": "chat", "penstock.dev/role": role, **labels}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": found, "managedFields": [{}]},
        "spec": {"containers": [{"name": "worker"}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    }


def stage(group: str, index: int, ip: str = "127.0.0.1") -> dict[str, Any]:
    """A pod of a prefill group."""
    return pod(
        f"{group}-{index}",
        "prefill",
        ip=ip,
        **{"penstock.dev/group": group, "apps.kubernetes.io/pod-index": str(index)},
    )


@dataclass(eq=False)
class FakeKubernetes:
    """The server; use it through `serving`."""

    credentials: Path
    url: str = ""
    token: str = "first"
    """Requests with another one are refused with 401."""
    version: int = 100
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    oldest: int = 0
    """Watches from before it get 410."""
    refuse: int = 0
    """Status with which everything is answered; 0: served."""
    mute: bool = False
    """Nothing is answered."""
    raw_list: bytes | None = None
    """Instead of the list."""
    silent: bool = False
    """Watches are opened and then forgotten."""
    page: int = 0
    """Most pods a page; 0: as asked."""
    asked: Counter[str] = field(default_factory=Counter)
    """list, watch, GET and PATCH of scales, 401."""
    patches: list[dict[str, Any]] = field(default_factory=list)
    conflicts: int = 0
    """So many PATCHes are refused with 409."""
    watch_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._log: list[tuple[int, dict[str, Any]]] = []
        self._watches: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Event()
        self.credentials.mkdir(exist_ok=True)
        self.mount_token(self.token)

    def mount_token(self, token: str) -> None:
        """Replace the token's file, as the kubelet does."""
        temporary = self.credentials / "token.new"
        temporary.write_text(token)
        temporary.replace(self.credentials / "token")

    # --- what happens in the cluster ----------------------------------------------------------

    def put(self, *pods: dict[str, Any]) -> None:
        """Create or change pods."""
        for each in pods:
            name = each["metadata"]["name"]
            kind = "MODIFIED" if name in self.pods else "ADDED"
            self._happen(kind, each)
            self.pods[name] = each

    def delete(self, name: str) -> None:
        self._happen("DELETED", self.pods.pop(name))

    def bookmark(self) -> None:
        self.version += 10
        self._happen("BOOKMARK", {"kind": "Pod", "metadata": {}})

    def say(self, line: bytes) -> None:
        """Write a raw line into every open watch."""
        for writer in self._watches:
            _chunk(writer, line + b"\n")

    def cut(self) -> None:
        """Break all watches' connections."""
        for writer in list(self._watches):
            writer.transport.abort()

    def _happen(self, kind: str, what: dict[str, Any]) -> None:
        self.version += 1
        what["metadata"]["resourceVersion"] = str(self.version)
        event = {"type": kind, "object": json.loads(json.dumps(what))}
        self._log.append((self.version, event))
        self._notify()

    async def until(self, kind: str, count: int = 1) -> None:
        """Wait until so many requests of a kind have come."""
        async with asyncio.timeout(10):
            while self.asked[kind] < count:
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- HTTP ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeKubernetes]:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._converse(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                raw = {k.lower(): v for k, v in (x.split(": ", 1) for x in head[1:] if x)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, target, _ = head[0].split(" ")
                await self._answer(method, target, raw, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._watches.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self.mute:
            await asyncio.Event().wait()
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if headers.get("authorization") != f"Bearer {self.token}":
            self._count("401")
            return _refuse(writer, 401, "Unauthorized")
        if self.refuse:
            self._count(str(self.refuse))
            return _refuse(writer, self.refuse, "told to refuse")
        if url.path == f"/api/v1/namespaces/{NAMESPACE}/pods":
            assert query["labelSelector"] == f"{SERVICE},penstock.dev/role in (decode,prefill)"
            if query.get("watch") == "1":
                return await self._watch(query, writer)
            self._count("list")
            return _send(writer, self.raw_list or json.dumps(self._list(query)).encode())
        return self._scale(method, url.path, headers, body, writer)

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        names = sorted(self.pods)
        start = int(query.get("continue", "0"))
        size = self.page or int(query["limit"])
        metadata: dict[str, Any] = {"resourceVersion": str(self.version)}
        if start + size < len(names):
            metadata["continue"] = str(start + size)
        items = [self.pods[name] for name in names[start : start + size]] or None
        return {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items}

    async def _watch(self, query: dict[str, str], writer: asyncio.StreamWriter) -> None:
        assert query["allowWatchBookmarks"] == "1" or query["allowWatchBookmarks"] == "true"
        since = int(query["resourceVersion"])
        self.watch_seconds.append(float(query["timeoutSeconds"]))
        if since < self.oldest:
            self._count("410")
            _refuse(writer, 410, "too old resource version")
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self._watches.add(writer)
        self._count("watch")
        silent = self.silent
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if silent else self.watch_seconds[-1]):
                while True:
                    changed = self._changed
                    for version, event in self._log:
                        if version > since and not silent:
                            since = version
                            _chunk(writer, json.dumps(event).encode() + b"\n")
                    await changed.wait()
        self._watches.discard(writer)
        writer.write(b"0\r\n\r\n")

    def _scale(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        writer: asyncio.StreamWriter,
    ) -> None:
        prefix = f"/apis/penstock.dev/v1alpha1/namespaces/{NAMESPACE}/rolescalers/"
        name = path.removeprefix(prefix).removesuffix("/scale")
        assert path == f"{prefix}{name}/scale"
        self._count(method)
        if name not in self.scales:
            return _refuse(writer, 404, f'rolescalers "{name}" not found')
        if method == "PATCH":
            assert headers["content-type"] == "application/merge-patch+json"
            patch = json.loads(body)
            if self.conflicts or patch["metadata"]["resourceVersion"] != str(self.version):
                self.conflicts = max(0, self.conflicts - 1)
                return _refuse(writer, 409, "the object has been modified")
            self.patches.append({"name": name, **patch["spec"]})
            self.scales[name] = patch["spec"]["replicas"]
            self.version += 1
        replicas = self.scales[name]
        spec = {"replicas": replicas} if replicas else {}  # as Go leaves it out
        metadata = {"name": name, "resourceVersion": str(self.version)}
        return _send(
            writer, json.dumps({"kind": "Scale", "metadata": metadata, "spec": spec}).encode()
        )

    def _count(self, kind: str) -> None:
        self.asked[kind] += 1
        self._notify()


def _send(writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK") -> None:
    writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def _refuse(writer: asyncio.StreamWriter, status: int, message: str) -> None:
    body = {"kind": "Status", "status": "Failure", "message": message, "code": status}
    _send(writer, json.dumps(body).encode(), f"{status} Refused")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
