"""The base image: a minimal Debian with Python, made from Debian's packages.

It stands for `python:3.11-slim`, the Dockerfiles' default, where no image registry can be reached.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from e2e.cluster import cache
from e2e.cluster.process import run
from e2e.cluster.settings import CACHE
from e2e.images import buildah

_SUITE = "bookworm"
_PACKAGES = ("python3", "python3-venv", "ca-certificates")
_UNUSED = (
    *("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale"),
    *("var/cache/apt", "var/lib/apt/lists", "var/log"),
)
"""Folders that are emptied, as slim images have them."""
_DEBOOTSTRAP_SECONDS = 1200


def name() -> str:
    """Return the name of the base image."""
    return f"localhost/penstock-e2e/python:{cache.key(_SUITE, *_PACKAGES, *_UNUSED)}"


def ensure() -> str:
    """Build the base image if it was not built before (two minutes), and return its name."""
    with cache.locked("base"):
        if not buildah.exists(name()):
            print(f"building a base image from Debian {_SUITE}'s packages", flush=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _build(Path(folder))
    return name()


def _build(folder: Path) -> None:
    root = folder / "root"
    run(
        *("debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, root),
        seconds=_DEBOOTSTRAP_SECONDS,
    )
    for unused in _UNUSED:
        shutil.rmtree(root / unused)
        (root / unused).mkdir()
    # Not by ADD of a folder, which would lose owners.
    run("tar", "--numeric-owner", "-C", root, "-cf", folder / "root.tar", ".", seconds=300)
    shutil.rmtree(root)
    (folder / "Dockerfile").write_text('FROM scratch\nADD root.tar /\nCMD ["python3"]\n')
    buildah.build(
        buildah.Build(
            name=name(),
            dockerfile=folder / "Dockerfile",
            context=folder,
            arguments={},
            secrets={},
        )
    )
