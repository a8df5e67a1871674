"""Become another program that dies with its parent, however the parent dies.

    python -I -S exec_shim.py PARENT_PID PROGRAM [ARGUMENT ...]

Run as a file, so that nothing but the standard library is imported. The kernel sends the signal
when the *thread* that started us ends; the supervisor starts processes from its main thread only.
The setting survives exec of ordinary programs. Grandchildren are not covered: who starts them has
to do the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CANNOT_RUN = 127


def main() -> int:
    """Exec the program; return an exit code only if that fails."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        print(f"prctl failed: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return _CANNOT_RUN
    if os.getppid() != parent:  # it died before prctl took effect
        return _CANNOT_RUN
    try:
        os.execvp(program[0], program)  # noqa: S606 - starting the program is the purpose
    except OSError as error:
        print(f"{program[0]} cannot be run: {error.strerror}", file=sys.stderr)
    return _CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
