"""Checkpoints: a directory of safetensors files, memory-mapped, read tensor by tensor.

A safetensors file is an 8-byte little-endian header length, a JSON header (name to dtype, shape and
byte range), then the tensors' bytes. Only the pages of tensors that are asked for are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError, safe_open

from penstock_runtime.model.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from penstock_runtime.model.shard import Cut

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read in all) after every tensor."""

_MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The limit that the safetensors format itself sets."""
_SAMPLE_BYTES = 64
"""Bytes of each tensor that enter the model digest: enough to tell two fine-tunes apart."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `start` and `end` are byte offsets in `file`."""

    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


class Checkpoint:
    """The tensors of a directory, by name. Opening reads headers only."""

    def __init__(self, directory: Path) -> None:
        """Index the tensors of `directory`.

        Raises WeightsError if there are none or a file is malformed.
        """
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        for file in _weight_files(directory):
            self.entries.update(_read_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def require(self, names: Iterable[str]) -> int:
        """Return the bytes of the named tensors. Raises WeightsError naming those missing."""
        names = list(names)
        missing = [name for name in names if name not in self.entries]
        if missing:
            shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
            raise WeightsError(
                f"{self.directory} lacks {len(missing)} tensors that config.json asks for: "
                f"{shown}; the download may be incomplete, or config.json is another checkpoint's"
            )
        return sum(self.entries[name].nbytes for name in names)

    def read(self, names: Iterable[str], progress: Progress) -> TensorReader:
        """Return a reader of the named tensors. Raises WeightsError naming those missing."""
        return TensorReader(self, list(names), progress)


class TensorReader:
    """Reads the tensors that were announced, each once, and reports the progress in bytes."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], progress: Progress) -> None:
        self._entries = checkpoint.entries
        self._total = checkpoint.require(names)
        self._done = 0
        self._progress = progress
        self._files: dict[Path, Any] = {}

    def take(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> torch.Tensor:
        """Return a tensor, or the part `cut` of it; only that part is read.

        It may lie in the memory-mapped file: copy it before changing it.

        Raises WeightsError if the whole tensor's shape is not `shape`, or its file cannot be read.
        """
        entry = self._entries[name]
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(entry.file, framework="pt")
            whole = self._files[entry.file].get_slice(name)
            if tuple(whole.get_shape()) != shape:
                raise WeightsError(
                    f"{name} in {entry.file} has shape {tuple(whole.get_shape())}, but config.json "
                    f"implies {shape}: they belong to different checkpoints"
                )
            tensor: torch.Tensor = (
                self._files[entry.file].get_tensor(name)
                if cut is None
                else whole[(*[slice(None)] * cut.dim, slice(cut.start, cut.stop))]
            )
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"cannot read {name} from {entry.file}: {error}") from error
        self._done += entry.nbytes
        self._progress(self._done, self._total)
        return tensor


def model_digest(directory: Path) -> str:
    """Return a digest of the model: workers whose digests differ never exchange KV.

    It covers config.json and, of the weights, names, sizes, headers and a few bytes of each tensor,
    not every byte: so it costs milliseconds, and tells fine-tunes of one shape apart.

    Raises WeightsError.
    """
    hasher = blake2b(digest_size=16, person=b"penstock-model")

    def add(part: bytes) -> None:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)

    try:
        add((directory / "config.json").read_bytes())
        for file in _weight_files(directory):
            add(file.name.encode())
            add(file.stat().st_size.to_bytes(8, "little"))
            entries = _read_header(file)
            with file.open("rb") as stream:
                for name, entry in sorted(entries.items()):
                    add(f"{name} {entry.start} {entry.end}".encode())
                    stream.seek(entry.start + entry.nbytes // 2)
                    add(stream.read(min(_SAMPLE_BYTES, entry.end - stream.tell())))
    except OSError as error:
        raise WeightsError(f"cannot read {error.filename}: {error.strerror}") from error
    return hasher.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """Return the weight files in order of name: those of the index if there is one."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return [directory / name for name in _indexed_names(index)]
    single = directory / "model.safetensors"
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{directory} has no *.safetensors file: give a checkpoint in safetensors format"
        )
    return files


def _indexed_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or "/" in name or name in {"", ".", ".."}:
            raise WeightsError(f"{index} names {name!r}: only files beside it are read")
    return names


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file. Raises WeightsError."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise WeightsError(f"{file} is not a safetensors file: header of {length} bytes")
            header = json.loads(stream.read(length))
        data, size = 8 + length, file.stat().st_size
        entries = {
            str(name): TensorEntry(file, data + int(start), data + int(end))
            for name, (start, end) in (
                (name, fields["data_offsets"])
                for name, fields in header.items()
                if name != "__metadata__"
            )
        }
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} has a malformed safetensors header: {error!r}") from error
    if any(not data <= entry.start <= entry.end <= size for entry in entries.values()):
        raise WeightsError(f"{file} is cut off: its header names bytes past its end")
    return entries
