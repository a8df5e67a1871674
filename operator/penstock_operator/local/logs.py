"""What pods print: into a file each, and to the terminal with the pod's name in front."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_LINE = 16 * 1024
"""Characters of a line that are kept."""
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_RESET = "\x1b[0m"


class Terminal:
    """Prints lines with a prefix; colours where there is a terminal.

    A reader that goes away (a closed pipe) ends the printing, not the service.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty()
        self._quiet = quiet
        self._gone = False
        self._numbers: dict[str, int] = {}

    def log(self, pod: str, line: str) -> None:
        """Print a line of a pod's log."""
        if not self._quiet:
            self._print(pod, line)

    def say(self, text: str) -> None:
        """Print what the supervisor itself has to tell."""
        for line in text.splitlines():
            self._print("penstock", line)

    def show(self, text: str) -> None:
        """Print text as it is, to be copied."""
        self._write(text)

    def _print(self, name: str, line: str) -> None:
        prefix = f"{name:<13} |"
        if self._colour:
            number = self._numbers.setdefault(name, len(self._numbers))
            prefix = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{prefix}{_RESET}"
        self._write(f"{prefix} {line}")

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            self._gone = True
            silence(self._stream)


def silence(stream: TextIO) -> None:
    """Send what a stream still holds to nowhere: its reader has gone, and closing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class LogFile:
    """Appends lines to a file and keeps it below about `limit` bytes by setting it aside once."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, line: str) -> None:
        """Append one line."""
        if self._file.tell() > self._limit:
            self._file.close()
            self._path.replace(self._path.with_suffix(".log.1"))
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._file.write(line + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LineSplitter:
    """Cuts a stream of bytes into lines of text, whatever the pieces it comes in.

    Of text that overwrites itself with carriage returns (progress bars) the last state is kept.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [_text(line) for line in lines]

    def finish(self) -> list[str]:
        """Return what is left without a line end."""
        rest, self._rest = self._rest, b""
        return [_text(rest)] if rest else []


def _text(line: bytes) -> str:
    shown = line.rstrip(b"\r").rpartition(b"\r")[2]
    return shown[:LONGEST_LINE].decode("utf-8", "replace")
