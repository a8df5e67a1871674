"""Compiles the kernels: `python -m penstock_runtime.kernels.build`. Standard library only.

The build hook of the package (`hatch_build.py`) runs this at install where there is a compiler. One
library is made for each level of instructions of this kind of processor, all from the same sources;
`library.py` chooses one by the flags of the processor that it runs on.

The libraries are not linked to an OpenMP runtime: they use the one that torch has loaded, so that
there is one team of threads in a process and `torch.set_num_threads` governs it.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
LIBRARIES = HERE / "lib"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
    # Every copy of a formula must round alike: no contraction by the compiler's own choice.
    *("-ffp-contract=off", "-fno-math-errno"),
    # Nothing of the C++ runtime is needed, so the library does not depend on its version.
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
_SECONDS = 600
"""For one level; it takes about ten on one core."""


class BuildError(Exception):
    """The kernels could not be compiled. Says what is missing."""


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions that a library is compiled for."""

    name: str
    flags: tuple[str, ...]
    capabilities: tuple[str, ...]
    """What the processor must have, by the names of `torch.cpu.get_capabilities`."""

    @property
    def library(self) -> Path:
        """Where its library is."""
        return LIBRARIES / f"penstock-{self.name}.so"


_V3 = ("avx2", "fma3", "f16c", "bmi2")
_V4 = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
_X86_LEVELS = (
    Level("x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), (*_V3, *_V4, "avx512_bf16")),
    Level("x86-64-v4", ("-march=x86-64-v4",), (*_V3, *_V4)),
    Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
)
_LEVELS = {
    "x86_64": _X86_LEVELS,
    "AMD64": _X86_LEVELS,
    "aarch64": (Level("armv8-a", ("-march=armv8-a",), ()),),
}


def levels() -> tuple[Level, ...]:
    """Return the levels of this kind of processor, the fastest first; none if it is unknown."""
    return _LEVELS.get(platform.machine(), ())


def find_compiler() -> str | None:
    """Return where a C++ compiler is, if there is one."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def source_digest() -> str:
    """Return the digest of everything that a library is made from."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in (*FLAGS, *(flag for level in levels() for flag in level.flags)):
        hasher.update(part.encode() + b"\0")
    for file in sorted(SOURCES.iterdir()):
        content = file.read_bytes()
        hasher.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return hasher.hexdigest()


def build() -> list[Path]:
    """Compile all levels of this kind of processor and return the libraries.

    Raises BuildError if there is no compiler, or it refuses a level; other levels are kept.
    """
    if not levels():
        raise BuildError(f"there are no kernels for a processor of kind {platform.machine()!r}")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"no C++ compiler found ({', '.join(COMPILERS)}): install one, for example g++ 11 or "
            "newer by `apt-get install g++`, and run `python -m penstock_runtime.kernels.build`"
        )
    digest = source_digest()
    try:
        LIBRARIES.mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            problems = pool.map(lambda level: _compile(compiler, level, digest), levels())
            refused = list(filter(None, problems))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"compiling into {LIBRARIES}: {error}") from error
    if refused:
        raise BuildError("\n".join(refused))
    return [level.library for level in levels()]


def _compile(compiler: str, level: Level, digest: str) -> str:
    """Return "" or what the compiler has against it."""
    with tempfile.TemporaryDirectory(dir=LIBRARIES) as folder:
        made = Path(folder) / level.library.name
        command = [
            *(compiler, *FLAGS, *level.flags, f'-DPENSTOCK_SOURCE_DIGEST="{digest}"'),
            # The OpenMP runtime stays an undefined symbol.
            *("-c", str(SOURCES / "all.cpp"), "-o", f"{made}.o"),
        ]
        link = [compiler, "-shared", "-nodefaultlibs", f"{made}.o", "-o", str(made), "-lc", "-lm"]
        for step in (command, link):
            done = subprocess.run(
                step, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
            if done.returncode:
                return f"{' '.join(step)}\n{done.stderr.strip()}"
        # In one step: a process that has the old one open keeps it.
        made.replace(level.library)
    return ""


def main() -> int:
    """Run the command line; return the exit status."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args()
    try:
        made = build()
    except BuildError as error:
        print(f"the kernels were not built: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
