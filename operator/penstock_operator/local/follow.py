"""Reads the logs of a service's pods as they grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_operator.local.logs import LineSplitter, Terminal

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_operator.local.state import StateDir


class LogReader:
    """Prints what is new in the logs of a role or a pod; new pods of a role are followed too."""

    def __init__(
        self, state: StateDir, which: str, *, tail: int | None, terminal: Terminal | None = None
    ) -> None:
        self._state = state
        self._which = which
        self._tail = tail
        self._terminal = terminal or Terminal()
        self._read: dict[str, tuple[int, int, LineSplitter]] = {}
        """Of each pod: inode, bytes read, unfinished line."""

    def known(self) -> list[str]:
        """Return the pods that have logs."""
        return sorted(path.stem for path in self._state.logs.glob("*.log"))

    def files(self) -> list[Path]:
        """Return the logs that match now: a pod's name, or a role with all its pods."""
        return [
            self._state.log_file(pod)
            for pod in self.known()
            if pod == self._which or pod.startswith(f"{self._which}-")
        ]

    def print_new(self) -> None:
        """Print the lines since the last call; at first the last `tail` ones, or all."""
        for path in self.files():
            first = path.stem not in self._read
            lines = self._new_lines(path)
            if first and self._tail is not None:
                lines = lines[-self._tail :] if self._tail else []
            for line in lines:
                self._terminal.log(path.stem, line)

    def _new_lines(self, path: Path) -> list[str]:
        with path.open("rb") as file:
            inode = path.stat().st_ino
            known, offset, splitter = self._read.get(path.stem, (inode, 0, LineSplitter()))
            if known != inode:  # set aside because it had grown large
                offset, splitter = 0, LineSplitter()
            file.seek(offset)
            data = file.read()
            self._read[path.stem] = (inode, offset + len(data), splitter)
        return splitter.feed(data)
