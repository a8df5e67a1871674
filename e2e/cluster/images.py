"""What nodes have in their containerd from the start.

A template containerd holds every image, unpacked. A node's containerd begins with a copy of its
root in which blobs and unpacked layers are hard links, and the databases are copies. That is sound
because containerd never writes into either: blobs are named by their digest, layers are the lower
directories of overlays, and both are only ever unlinked. So any number of nodes has gigabytes of
layers at the price of one, on disk and in the page cache.
"""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from typing import TYPE_CHECKING

from e2e.cluster import cache, containerd, oci
from e2e.cluster.cgroups import Cgroup
from e2e.cluster.process import Program, run
from e2e.cluster.settings import CACHE, NAME
from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_FOLDERS = containerd.Folders(CACHE / "images" / "containerd")
_CGROUP = Cgroup(f"{NAME}-images")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def pause_image(program: Path) -> oci.Image:
    """Return the image of the container that holds a pod's namespaces."""
    return oci.static_image(
        CACHE / "images" / "pause", name=containerd.PAUSE_IMAGE, program=program, user=65535
    )


def prepare(images: Sequence[oci.Image]) -> None:
    """Make the template hold exactly these images."""
    with cache.locked("images"), _template():
        load(_FOLDERS, images)
        for name in containerd.images(_FOLDERS).keys() - {image.name for image in images}:
            containerd.remove_image(_FOLDERS, name)
        _share_blobs(images)


@contextlib.contextmanager
def _kept(folders: containerd.Folders, name: str | None) -> Iterator[None]:
    """Keep what is called `name` until its successor is unpacked.

    An import gives the name away first, and then containerd may remove the layers, unpacked, that
    both have in common.
    """
    if name is None:
        yield
        return
    containerd.tag(folders, name, f"{name}-previous")
    yield
    containerd.remove_image(folders, f"{name}-previous")


def _share_blobs(images: Iterable[oci.Image]) -> None:
    """Let the layouts have the template's files instead of gigabytes of their own."""
    for image in images:
        for digest in image.blobs:
            own, shared = image.blob(digest), containerd.blob(_FOLDERS, digest)
            if not own.samefile(shared):
                own.unlink()
                own.hardlink_to(shared)


def copy_to(folders: containerd.Folders) -> None:
    """Make the root of a containerd that is not running a copy of the template."""
    with cache.locked("images"):
        folders.base.mkdir(parents=True, exist_ok=True)
        run("cp", "--archive", "--link", _FOLDERS.root, folders.root, seconds=600)
        for database in folders.root.glob("*/*.db"):
            original = _FOLDERS.root / database.relative_to(folders.root)
            database.unlink()
            shutil.copy2(original, database)


def load(folders: containerd.Folders, images: Iterable[oci.Image]) -> None:
    """Load what a running containerd lacks of these images."""
    present = containerd.images(folders)
    blobs = containerd.blobs(folders)
    for image in images:
        if present.get(image.name) == image.digest:
            continue
        with _kept(folders, image.name if image.name in present else None):
            containerd.load(folders, partial(oci.pack, image, without=frozenset(blobs)))
        blobs |= set(image.blobs)


@contextlib.contextmanager
def _template() -> Iterator[None]:
    """Run the template's containerd."""
    _CGROUP.kill()  # of a harness that was killed
    containerd.configure(_FOLDERS, cni=_FOLDERS.base / "cni")
    program = Program(
        name="containerd of the images",
        command=["containerd", "--config", _FOLDERS.configuration],
        namespace=None,
        cgroup=_CGROUP,
        log=_FOLDERS.base / "log",
        environment={"PATH": _PATH},
    )
    program.start()

    def serves() -> bool:
        program.check()
        return containerd.serves(_FOLDERS.socket)

    try:
        until("containerd serves", serves, seconds=60)
        yield
    finally:
        # Its databases are transactional: it may end at any moment.
        _CGROUP.kill()
        _CGROUP.remove()
