"""Where a model comes from: a URI to a directory in Hugging Face format.

    file:///DIRECTORY             used where it lies
    hf://ORG/NAME[@REVISION]      downloaded into the hub's cache, or found there
    s3://BUCKET/PREFIX[?…]        downloaded into a cache, or found there; see `s3_source`

The libraries of hub and object store are loaded only when a URI asks for them.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

Progress: TypeAlias = Callable[[int, int], None]
"""(bytes done, bytes known in total): called from the downloading threads, one at a time."""

PATTERNS = ("*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt")
"""The files that any part of Penstock reads: configuration, tokenizer, chat template, weights."""

FETCHING = "fetching the model"
"""How a worker's message begins while its model comes over the network."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NETWORK_BAR = "Downloading bytes"
_REVISION = re.compile(r"[\w][\w./-]*")


class ModelSourceError(Exception):
    """A model that cannot be had; the message names what and the remedy."""


def resolve(
    uri: str,
    *,
    cache_dir: Path | None = None,
    token: str | None = None,
    token_file: Path | None = None,
    allow_patterns: Sequence[str] = PATTERNS,
    progress: Progress | None = None,
    endpoint: str | None = None,
) -> Path:
    """Return the directory of the model that `uri` names. May take long; blocks.

    Args:
        uri: see the head of this file.
        cache_dir: of downloads; default: the hub library's own, and for s3:// the user's.
        token: the hub's access token, for gated and private models.
        token_file: a file with it; `token` wins. For s3:// the directory of the store's keys.
        allow_patterns: which files are downloaded.
        progress: told as bytes come in.
        endpoint: URL of the hub, or of a mirror.

    Raises:
        ModelSourceError: the URI is malformed, or the model is not there.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "file":
        return _local(uri)
    if separator and scheme == "hf":
        repository, revision = parse_hub(uri)
        return _download(
            repository,
            revision,
            cache_dir=cache_dir,
            token=token or _read_token(token_file),
            allow_patterns=allow_patterns,
            progress=progress,
            endpoint=endpoint,
        )
    if separator and scheme == "s3":
        from penstock_wire import s3_source  # noqa: PLC0415 - heavy, and rarely needed

        found = s3_source.fetch(
            uri,
            cache_dir=cache_dir,
            keys=token_file,
            allow_patterns=allow_patterns,
            progress=progress,
        )
        return _checkpoint(found, uri)
    remedy = (
        f"; did you mean file://{Path(uri).absolute()}?" if not separator and rest == "" else ""
    )
    raise ModelSourceError(
        f"the model URI {uri!r} is not known: write file:///DIRECTORY, "
        f"hf://ORG/NAME[@REVISION] or s3://BUCKET/PREFIX{remedy}"
    )


def parse_hub(uri: str) -> tuple[str, str | None]:
    """Return (repository, revision or None) of an hf:// URI. Raises ModelSourceError."""
    repository, at, revision = uri.removeprefix("hf://").partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        raise ModelSourceError(
            f"the model URI {uri!r} is malformed: write hf://ORG/NAME[@REVISION]"
        )
    return repository, revision or None


def _local(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc or not parts.path.startswith("/"):
        raise ModelSourceError(
            f"the model URI {uri!r} is malformed: file:// is followed by an absolute path, so "
            "there are three slashes"
        )
    directory = Path(unquote(parts.path))
    try:
        return _checked(directory)
    except OSError as error:
        raise ModelSourceError(
            f"the model directory {directory} cannot be read: {error}; let user {os.getuid()} "
            "enter it and the directories above it"
        ) from error


def _checked(directory: Path) -> Path:
    if not directory.is_dir():
        state = "a file, not a directory" if directory.exists() else "not there"
        raise ModelSourceError(
            f"the model directory {directory} is {state}; give the directory that holds config.json"
        )
    if not (directory / "config.json").is_file():
        raise ModelSourceError(
            f"the model directory {directory} has no config.json; it must be a checkpoint in "
            "Hugging Face format, as save_pretrained writes it"
        )
    return directory


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ModelSourceError(f"the token file {path} cannot be read: {error}") from error
    if not token:
        raise ModelSourceError(
            f"the token file {path} is empty; write the hub's access token in it"
        )
    return token


def _download(
    repository: str,
    revision: str | None,
    *,
    cache_dir: Path | None,
    token: str | None,
    allow_patterns: Sequence[str],
    progress: Progress | None,
    endpoint: str | None,
) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - heavy, and rarely needed
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository}@{revision}" if revision else repository
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            # False, not None: without a token of ours, nobody's from elsewhere is sent either.
            token=token or False,
            allow_patterns=list(allow_patterns),
            endpoint=endpoint,
            tqdm_class=_progress_bar(progress),
        )
    except GatedRepoError as error:
        raise ModelSourceError(
            f"the model {name} is gated: accept its conditions on the hub and give the token of "
            "that account"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "the token may read it" if token else "it is public, or give a token"
        raise ModelSourceError(
            f"the model {name} is not on the hub; check the name, and that {hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelSourceError(f"the model {repository} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"the hub cannot be reached and {name} is not in the cache: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelSourceError(f"the model {name} cannot be downloaded: {error}") from error
    return _checkpoint(Path(found), name)


def _checkpoint(directory: Path, name: str) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelSourceError(f"{name} has no config.json: it is no model in Hugging Face format")
    return directory


class _Discard(io.TextIOBase):
    """A text stream that keeps nothing: progress is told, not drawn."""

    def write(self, text: str) -> int:
        return len(text)


def _progress_bar(progress: Progress | None) -> type[Any]:
    """Return the class of progress bars by which the hub's library reports what it has done.

    The library makes one bar for files and one or two for bytes: those that reached the disk, and
    in some versions those that came over the network, which is left out, as its total is a guess.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415 - the hub's

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]
        """A bar that draws nothing."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            keywords.pop("name", None)
            keywords |= {"file": _Discard(), "disable": False}
            super().__init__(*arguments, **keywords)
            self._told = keywords.get("unit") == "B" and keywords.get("desc") != _NETWORK_BAR

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                drawn: bool | None = super().update(n)
                if self._told and progress is not None:
                    progress(int(self.n), int(self.total or 0))
            return drawn

    return Bar
