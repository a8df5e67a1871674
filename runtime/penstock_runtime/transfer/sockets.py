"""The sockets behind NIXL's agents: the kernel says when there is something to do on one.

NIXL over TCP moves on only while it is asked, and has no way to wait. But UCX, underneath, keeps an
epoll set for each of a worker's network interfaces: the sockets that it expects bytes on, or waits
to write to. Such a set can itself be waited for. So a process that has nothing to move sleeps,
instead of asking a thousand times a second, and wakes when the first byte comes.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from pathlib import Path

_EPOLL = "anon_inode:[eventpoll]"
_WATCHED = re.compile(r"^tfd:\s*(\d+)", re.MULTILINE)


def event_sets() -> frozenset[int]:
    """Return the epoll descriptors of this process that watch no epoll descriptor.

    UCX's own thread has one that does: it takes in connections, and is no sign of bytes. None where
    there is no /proc.
    """
    try:
        known = list(Path("/proc/self/fd").iterdir())
    except OSError:
        return frozenset()
    found = {int(entry.name) for entry in known if _target(entry) == _EPOLL}
    return frozenset(fd for fd in found if not found & _watched_by(fd))


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""  # it was closed meanwhile


def _watched_by(epoll: int) -> set[int]:
    try:
        text = Path(f"/proc/self/fdinfo/{epoll}").read_text(encoding="ascii")
    except OSError:
        return set()
    return {int(descriptor) for descriptor in _WATCHED.findall(text)}


class Sockets:
    """What one thread waits for: other threads ring it, sockets wake it."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ready = select.epoll()
        self._ready.register(self._bell, select.EPOLLIN)

    def ring(self) -> None:
        """End the wait, or the next one. From any thread, not after `close`."""
        os.eventfd_write(self._bell, 1)

    def watch(self, event_set: int) -> None:
        """Wake for this epoll set too."""
        self._ready.register(event_set, select.EPOLLIN)

    def forget(self, event_set: int) -> None:
        """Wake for it no more. Call this before it is closed.

        One that is closed already is forgotten already: it was opened for something else at the
        same moment as an agent was, by another thread.
        """
        with contextlib.suppress(OSError):
            self._ready.unregister(event_set)

    def wait(self, seconds: float) -> bool:
        """Return when rung, woken, or after `seconds`, rounded up to milliseconds.

        Tells whether sockets are ready.
        """
        found = {descriptor for descriptor, _ in self._ready.poll(seconds)}
        if self._bell in found:
            os.eventfd_read(self._bell)
        return bool(found - {self._bell})

    def close(self) -> None:
        """Give the descriptors back."""
        self._ready.close()
        os.close(self._bell)
