"""Whether a file that is read again and again has changed since the last time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

Stamp: TypeAlias = tuple[int, int, int]


def file_stamp(path: Path) -> Stamp:
    """Return what changes when the file is replaced or written. Raises OSError."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
