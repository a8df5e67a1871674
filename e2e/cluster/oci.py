"""Images as OCI layouts: folders of blobs named by their digest.

An image travels to containerd as an archive of the blobs that are not there yet, so that a change
of our code moves kilobytes, not the gigabytes below it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, slots=True)
class Image:
    """One image in a layout."""

    name: str
    """With its registry's name and its tag, as containerd keeps it."""
    layout: Path
    digest: str
    """Of the manifest: sha256:..."""

    def blob(self, digest: str) -> Path:
        """Return the file of a blob."""
        return self.layout / "blobs" / digest.replace(":", "/")

    @property
    def blobs(self) -> list[str]:
        """Digests of the manifest and of all that it names."""
        manifest = json.loads(self.blob(self.digest).read_bytes())
        parts = [manifest["config"], *manifest["layers"]]
        return [self.digest, *(part["digest"] for part in parts)]

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(self.blob(digest).stat().st_size for digest in self.blobs)


def pack(image: Image, archive: IO[bytes], *, without: Container[str] = ()) -> None:
    """Write an OCI archive of `image`, less the blobs whose digests are in `without`."""
    manifest = image.blob(image.digest).stat().st_size
    entry = {
        "mediaType": _MANIFEST,
        "digest": image.digest,
        "size": manifest,
        "annotations": {"io.containerd.image.name": image.name},
    }
    with tarfile.open(fileobj=archive, mode="w|") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _json({"schemaVersion": 2, "manifests": [entry]}))
        for digest in dict.fromkeys(image.blobs):  # a layer may be there twice
            if digest == image.digest or digest not in without:
                tar.add(image.blob(digest), f"blobs/{digest.replace(':', '/')}")


def prune(layout: Path, images: Iterable[Image]) -> int:
    """Remove the blobs from a layout that belong to none of these images; return their bytes."""
    used = {digest.removeprefix("sha256:") for image in images for digest in image.blobs}
    unused = [blob for blob in (layout / "blobs" / "sha256").iterdir() if blob.name not in used]
    size = sum(blob.stat().st_size for blob in unused)
    for blob in unused:
        blob.unlink()
    return size


def static_image(layout: Path, *, name: str, program: Path, user: int) -> Image:
    """Make an image that holds one static program and runs it as `user`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, program.name, program.read_bytes())
    files = buffer.getvalue()
    layer = _store(layout, _LAYER, gzip.compress(files, mtime=0))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": str(user)},
        "rootfs": {"type": "layers", "diff_ids": [_digest(files)]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _store(layout, _CONFIG, _json(config)),
        "layers": [layer],
    }
    return Image(name, layout, _store(layout, _MANIFEST, _json(manifest))["digest"])


def _store(layout: Path, media_type: str, data: bytes) -> dict[str, Any]:
    """Put a blob into the layout and return how other blobs refer to it."""
    digest = _digest(data)
    path = layout / "blobs" / digest.replace(":", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o755
    tar.addfile(entry, io.BytesIO(data))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
