"""What takes long to make is made once a machine, in a folder named by a hash of its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from e2e.cluster.settings import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def key(*parts: str | bytes) -> str:
    """Return a short name for exactly these inputs."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`, after `make` has filled it if it was not there.

    It appears under its name only when it is whole. A second process waits for the first.
    """
    folder = CACHE / name
    with locked(name):
        if not folder.exists():
            draft = folder.with_name(f"{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            make(draft)
            draft.rename(folder)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process a machine in at a time. The lock ends with the process that holds it."""
    path = CACHE / "locks" / name.replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
