"""buildah, with a storage of its own in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e2e.cluster import oci
from e2e.cluster.errors import ProgramFailedError
from e2e.cluster.process import run
from e2e.cluster.settings import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_FOLDER = CACHE / "buildah"
_TEMPORARY = _FOLDER / "tmp"
_BUILD_SECONDS = 3600
_MUCH_BYTES = 2**30
_LAYOUT = CACHE / "images" / "layout"


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One image to be built."""

    name: str
    """With its registry's name and its tag."""
    dockerfile: Path
    context: Path
    arguments: Mapping[str, str]
    secrets: Mapping[str, Path]
    """Files that steps may read and that do not become part of the image."""


def build(wanted: Build) -> None:
    """Build an image; steps whose inputs are unchanged come from the cache.

    Raises:
        ProgramFailedError: with the end of what the builder wrote.
    """
    command = [*_buildah(), "build", "--layers", "--isolation", "chroot", "--tag", wanted.name]
    for name, value in wanted.arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for name, path in wanted.secrets.items():
        command += ["--secret", f"id={name},src={path}"]
    command += ["--file", str(wanted.dockerfile), str(wanted.context)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
        env={**os.environ, "TMPDIR": str(_TEMPORARY)},
    )
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-40:])
        raise ProgramFailedError(f"building {wanted.name} failed:\n{end}")


def clean() -> None:
    """Remove what builds left that were interrupted. Nobody else may be building."""
    run(*_buildah(), "rm", "--all")
    shutil.rmtree(_TEMPORARY, ignore_errors=True)
    _TEMPORARY.mkdir(parents=True)


def exists(name: str) -> bool:
    """Return whether an image of this name was built before."""
    done = subprocess.run(
        [*_buildah(), "inspect", "--type", "image", name], capture_output=True, check=False
    )
    return done.returncode == 0


def export(name: str) -> oci.Image:
    """Return a built image in the layout. Layers that are there already cost nothing.

    Layers are not compressed: a compressor would take longer than the disk. That is also why this
    is not `buildah push`, which always compresses into a layout.
    """
    _LAYOUT.mkdir(parents=True, exist_ok=True)
    digest = _LAYOUT.with_name("digest")
    run(
        *("skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"),
        *("--digestfile", digest),
        f"containers-storage:[overlay@{_FOLDER / 'root'}+{_FOLDER / 'run'}]{name}",
        f"oci:{_LAYOUT}:{name}",
        seconds=_BUILD_SECONDS,
    )
    return oci.Image(name, _LAYOUT, digest.read_text(encoding="utf-8").strip())


def prune(kept: Iterable[oci.Image]) -> None:
    """Remove from the layout what none of these images needs, and from the storage if it is much.

    The storage also holds stages that the next build takes from the cache, so it is not cleaned
    after every change of code.
    """
    if oci.prune(_LAYOUT, kept) > _MUCH_BYTES:
        run(*_buildah(), "rmi", "--prune", "--force", seconds=300)


def _buildah() -> list[str]:
    storage = ["--root", str(_FOLDER / "root"), "--runroot", str(_FOLDER / "run")]
    return ["buildah", *storage, "--storage-driver", "overlay"]
