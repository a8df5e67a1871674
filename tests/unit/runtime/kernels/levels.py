"""Do the kernels give the same bits at every level of instructions? `levels.cpp` prints digests.

As a program it asks the same of ARM, on x86-64: the kernels are compiled by a cross compiler, and
run under emulation.

    apt-get install g++-aarch64-linux-gnu qemu-user
    uv run python -m tests.unit.runtime.kernels.levels
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from penstock_runtime.kernels import build
from penstock_runtime.kernels.library import usable_levels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.kernels.build import Level

DRIVER = Path(__file__).with_suffix(".cpp")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
_SECONDS = 300


def results(level: Level, folder: Path) -> list[str]:
    """Return what the driver prints over a built library."""
    program, command = folder / level.name, build.find_compiler()
    assert command is not None
    library = level.library
    _run(
        *(command, "-std=c++17", "-O1", f"-I{build.SOURCES}", str(DRIVER), "-o", str(program)),
        *(str(library), f"-Wl,-rpath,{library.parent}", "-fopenmp"),
    )
    return _run(str(program)).splitlines()


def arm_results(folder: Path) -> list[str]:
    """Compile all for ARMv8 and return what it prints under emulation."""
    program = folder / "arm"
    flags = [flag for flag in build.FLAGS if flag not in {"-shared", "-fPIC"}]
    _run(
        *(ARM_COMPILER, *flags, "-march=armv8-a", "-static", f"-I{build.SOURCES}"),
        '-DPENSTOCK_SOURCE_DIGEST="levels"',
        *(str(DRIVER), str(build.SOURCES / "all.cpp"), "-o", str(program)),
    )
    return _run(ARM_EMULATOR, str(program)).splitlines()


def differences(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return the results that differ."""
    return [f"{a}  and  {b}" for a, b in zip(one, other, strict=True) if a != b]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> int:
    """Compare ARM with this processor; return the exit status."""
    missing = [tool for tool in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(tool) is None]
    if missing:
        print(f"{', '.join(missing)} is missing: {__doc__}", file=sys.stderr)
        return 2
    level = usable_levels()[0]
    with tempfile.TemporaryDirectory() as folder:
        here, arm = results(level, Path(folder)), arm_results(Path(folder))
    differ = differences(here, arm)
    print(*differ, f"{len(differ)} of {len(here)} results differ: {level.name} and ARM", sep="\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
