"""A real S3 server for tests: moto's, in an environment of its own, as its packages clash."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator

MOTO = "moto[server]==5.2.5"
_READY = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
_START_SECONDS = 100.0
"""The first time its packages are downloaded."""
_STOP_SECONDS = 10.0
# moto checks no signature, but tells by it who is nobody.
_SIGNED = "AWS4-HMAC-SHA256 Credential=admin/20260101/us-east-1/s3/aws4_request, Signature=none"


@dataclass(slots=True)
class Admin:
    """Puts objects into the server, past whatever stands before it."""

    url: str
    _http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": _SIGNED}, timeout=10, trust_env=False
        )

    def make_bucket(self, bucket: str) -> None:
        self._ask("PUT", bucket)

    def put(self, bucket: str, key: str, data: bytes, *, acl: str = "public-read") -> None:
        self._ask("PUT", f"{bucket}/{key}", data, {"x-amz-acl": acl})

    def delete(self, bucket: str, key: str) -> None:
        self._ask("DELETE", f"{bucket}/{key}")

    def reset(self) -> None:
        """Forget all buckets."""
        self._ask("POST", "moto-api/reset")

    def close(self) -> None:
        self._http.close()

    def _ask(
        self, method: str, path: str, data: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self._http.request(method, path, content=data, headers=headers).raise_for_status()


@contextmanager
def running() -> Iterator[Admin]:
    """Run the server on a free port of this machine."""
    uv = shutil.which("uv")
    if uv is None:
        raise RuntimeError(
            "the S3 tests start moto's server with uv, which is not on PATH: pip install uv"
        )
    command = [uv, "tool", "run", "--no-config", "--python", sys.executable, "--from", MOTO]
    server = subprocess.Popen(
        [*command, "moto_server", "-H", "127.0.0.1", "-p", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert server.stdout is not None
    output = _Output(server.stdout)
    try:
        admin = Admin(output.url())
        yield admin
        admin.close()
    finally:
        _end(server)
        output.close()


class _Output:
    """Reads what the server writes, so that it never waits for a reader."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._last: deque[str] = deque(maxlen=20)
        self._found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="s3-server-output", daemon=True)
        self._thread.start()

    def url(self) -> str:
        """Return where the server listens, as soon as it does."""
        try:
            found = self._found.get(timeout=_START_SECONDS)
        except queue.Empty:
            found = None
        if found is None:
            raise RuntimeError(
                f"{MOTO} did not listen within {_START_SECONDS:.0f} s; the first time, it is "
                f"downloaded from the package index. It wrote: {''.join(self._last) or 'nothing'}"
            )
        return found

    def close(self) -> None:
        """Wait for the end of the output, which comes with that of the server."""
        self._thread.join(_STOP_SECONDS)
        self._stream.close()

    def _read(self) -> None:
        for line in self._stream:
            self._last.append(line)
            ready = _READY.search(line)
            if ready:
                self._found.put(ready[1])
        self._found.put(None)


def _end(server: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # all of the group has ended
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
            return
    raise RuntimeError(f"moto's server, process {server.pid}, does not end")
