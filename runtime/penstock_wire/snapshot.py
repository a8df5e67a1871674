"""A remote directory downloaded as a whole: in parallel parts, resumed after a crash, never half.

    ROOT/lock                    held while files come in (flock), so processes do not do it twice
    ROOT/VERSION-SIZE.partial/   files as they come in, in parts of SIZE bytes, each beside
                                 NAME.parts: a byte for every part, 1 once it is on the disk
    ROOT/VERSION/                what the former is renamed to when every file is complete

A version is a hash of names, sizes and versions of all files, so a changed directory is another
one. Where the bytes come from is the caller's business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


class Interrupted(Exception):  # noqa: N818 - it names what happened
    """A part did not come whole; it is worth another try."""


class SnapshotError(Exception):
    """The directory cannot be downloaded; the message says why."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the remote directory."""

    name: str
    """Without folders."""
    size: int
    """Bytes."""
    version: str
    """Changes with the content."""


class Read(Protocol):
    """Gives bytes of a file."""

    def __call__(self, file: RemoteFile, first: int, count: int, /) -> Iterable[bytes]:
        """Give `count` bytes from `first` on, in chunks. Raises Interrupted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotSettings:
    """How files are brought."""

    part_bytes: int = 32 * 1024 * 1024
    """Bytes asked for at once: large enough for a connection's full speed, and what a crash costs
    of each part under way."""
    parallel: int = 8
    """Parts under way. One connection to an object store carries some 50 to 100 MB/s."""
    attempts: int = 6
    """Tries of a part, with waits that double between them."""
    first_wait_seconds: float = 0.5
    """Before the second try; the waits of six tries sum up to 15 s."""
    lock_seconds: float = 4 * 3600.0
    """How long to wait while another process downloads the same: a large model on a slow line."""


def newest(root: Path) -> Path | None:
    """Return the complete directory that was made last, None if there is none."""
    if not root.is_dir():
        return None
    whole = [entry for entry in root.iterdir() if entry.is_dir() and entry.suffix != ".partial"]
    return max(whole, key=lambda entry: entry.stat().st_mtime, default=None)


def download(
    root: Path,
    files: Sequence[RemoteFile],
    read: Read,
    *,
    settings: SnapshotSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Return a directory with exactly these files, downloaded unless it is there. Blocks.

    Args:
        root: where this remote directory is kept; made if missing.
        files: what it holds.
        read: called from several threads.
        settings: how files are brought.
        progress: told (bytes on the disk, bytes in all), by one thread at a time.

    Raises:
        SnapshotError: the disk is too small, a part did not come in all its tries, or another
            process has held the lock too long.
        OSError: the disk.
        Exception: what `read` raises beside Interrupted.
    """
    settings = settings or SnapshotSettings()
    whole = root / _version(files)
    if whole.is_dir():
        return whole
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "lock", settings.lock_seconds):
        if not whole.is_dir():
            partial = whole.with_name(f"{whole.name}-{settings.part_bytes}.partial")
            partial.mkdir(exist_ok=True)
            _Download(partial, files, read, settings, progress).run()
            partial.rename(whole)
            for stale in root.glob("*.partial"):
                shutil.rmtree(stale)
    return whole


class _Download:
    """Brings all parts of all files into one directory."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[RemoteFile],
        read: Read,
        settings: SnapshotSettings,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._read = read
        self._settings = settings
        self._progress = progress or (lambda _done, _total: None)
        self._files = [_PartialFile(directory, file, settings.part_bytes) for file in files]
        self._total = sum(file.size for file in files)
        self._lock = threading.Lock()
        self._done = 0
        self._stop = threading.Event()

    def run(self) -> None:
        """Bring what is missing."""
        missing = [(file, part) for file in self._files for part in file.open()]
        left = sum(file.extent(part)[1] for file, part in missing)
        self._require_space(left)
        self._advance(self._total - left)
        with ThreadPoolExecutor(self._settings.parallel, "download") as pool:
            jobs = [pool.submit(self._bring, file, part) for file, part in missing]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
        for job in done:
            job.result()
        for file in self._files:
            file.close()

    def _require_space(self, needed: int) -> None:
        directory = self._files[0].path.parent if self._files else Path()
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise SnapshotError(
                f"{needed / 1e9:.1f} GB are to be downloaded, and {directory} has "
                f"{free / 1e9:.1f} GB left: give the cache volume more space"
            )

    def _bring(self, file: _PartialFile, part: int) -> None:
        """Bring a part; the first that fails stops the others."""
        try:
            self._try(file, part)
        except BaseException:
            self._stop.set()
            raise

    def _try(self, file: _PartialFile, part: int) -> None:
        first, count = file.extent(part)
        tries = self._settings.attempts
        for attempt in range(1, tries + 1):
            if self._stop.is_set():
                return
            try:
                file.write(part, self._read(file.remote, first, count))
            except Interrupted as error:
                if attempt == tries:
                    raise SnapshotError(
                        f"{file.remote.name} did not come in {tries} tries: {error}"
                    ) from error
                self._stop.wait(self._settings.first_wait_seconds * 2 ** (attempt - 1))
            else:
                self._advance(count)
                return

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


class _PartialFile:
    """A file of which some parts are there. Parts may be written by several threads."""

    def __init__(self, directory: Path, remote: RemoteFile, part_bytes: int) -> None:
        self.remote = remote
        self.path = directory / remote.name
        self._journal = directory / f"{remote.name}.parts"
        self._part_bytes = part_bytes
        self._parts = -(-remote.size // part_bytes)

    def open(self) -> list[int]:
        """Make the file if it is not there, and return the parts that are missing."""
        if self.path.exists() and not self._journal.exists():
            return []  # closed
        whole = self.path.exists() and self.path.stat().st_size == self.remote.size
        told = self._journal.read_bytes() if whole else b""
        if not whole or len(told) != self._parts:  # new, or cut off by a crash
            told = bytes(self._parts)
            self._journal.write_bytes(told)
            with self.path.open("wb") as file:
                file.truncate(self.remote.size)
        return [part for part, there in enumerate(told) if not there]

    def extent(self, part: int) -> tuple[int, int]:
        """Return where a part begins, and how many bytes it has."""
        first = part * self._part_bytes
        return first, min(self._part_bytes, self.remote.size - first)

    def write(self, part: int, chunks: Iterable[bytes]) -> None:
        """Put a part in its place. Raises Interrupted if the chunks are not all of it."""
        first, count = self.extent(part)
        written = 0
        with self.path.open("r+b") as file:
            file.seek(first)
            for chunk in chunks:
                if written + len(chunk) > count:
                    raise Interrupted(f"more than the {count} bytes came that were asked for")
                file.write(chunk)
                written += len(chunk)
            if written != count:
                raise Interrupted(f"{written} of {count} bytes came")
            file.flush()
            os.fdatasync(file.fileno())  # before the journal says that it is there
        with self._journal.open("r+b") as journal:
            journal.seek(part)
            journal.write(b"\x01")

    def close(self) -> None:
        """Mark the file as complete."""
        self._journal.unlink(missing_ok=True)


def _version(files: Sequence[RemoteFile]) -> str:
    listing = sorted((file.name, file.size, file.version) for file in files)
    return hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(path: Path, limit: float) -> Iterator[None]:
    deadline = time.monotonic() + limit
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SnapshotError(
                        f"another process has been downloading the same for {limit:.0f} s "
                        f"({path} is locked)"
                    ) from None
                time.sleep(0.2)
        yield
