"""Mounts below a folder, and their end."""

from __future__ import annotations

from pathlib import Path

from e2e.cluster.process import run
from e2e.cluster.waiting import until


def below(folder: Path) -> list[str]:
    """Return the mount points below `folder`, innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        # Blanks and backslashes in paths are written as octal numbers.
        point = line.split()[4].encode().decode("unicode_escape")
        if Path(point).is_relative_to(folder):
            points.append(point)
    return points[::-1]


def unmount_below(folder: Path) -> None:
    """Unmount everything below `folder`, whose users must have ended. Raises NotInTimeError."""

    def gone() -> bool:
        for point in below(folder):
            run("umount", "--lazy", point)
        return not below(folder)

    until(f"nothing is mounted below {folder}", gone, seconds=30)
