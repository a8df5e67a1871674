"""Models in an object store that speaks S3: listed, and downloaded into a cache directory.

    s3://BUCKET/PREFIX[?region=REGION&endpoint=URL]

The files directly below the prefix are taken, as far as they match. Requests are signed with the
keys that are given, else with those of the environment (see `s3_identity`), else not at all.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from penstock_wire.model_source import ModelSourceError
from penstock_wire.s3_bucket import Bucket, Location, StoreError
from penstock_wire.s3_identity import from_environment, read_keys
from penstock_wire.snapshot import SnapshotError, SnapshotSettings, download, newest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_wire.model_source import Progress

log = logging.getLogger(__name__)

_BUCKET = re.compile(r"(?!xn--)[A-Za-z0-9][A-Za-z0-9._-]*")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_ENDPOINT = re.compile(
    r"https?://([\w-]+(?:\.[\w-]+)*|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[\w./~-]*)?",
    re.ASCII,
)
"""The client panics on what is no URL, so none but plain ones reach it."""


def parse_location(uri: str) -> Location:
    """Return what an s3:// URI names. Raises ModelSourceError."""
    malformed = ModelSourceError(
        f"the model URI {uri!r} is malformed: write s3://BUCKET/PREFIX, with "
        "?region=REGION&endpoint=URL where they matter"
    )
    try:
        parts = urlsplit(uri)
    except ValueError as error:  # a bracket that is not closed
        raise malformed from error
    query = parse_qs(parts.query, keep_blank_values=True)
    known = set(query) <= {"region", "endpoint"} and all(map(any, query.values()))
    region = query.get("region", ["us-east-1"])[0]
    named = _BUCKET.fullmatch(parts.netloc) and _REGION.fullmatch(region)
    if not named or not known or parts.fragment:
        raise malformed
    endpoint = query.get("endpoint", [None])[0]
    if endpoint is not None and not _is_endpoint(endpoint):
        raise ModelSourceError(
            f"the endpoint {endpoint!r} of {uri!r} is no URL of a store: write "
            "http://HOST[:PORT] or https://HOST[:PORT]"
        )
    prefix = parts.path.strip("/")
    return Location(
        bucket=parts.netloc,
        prefix=f"{prefix}/" if prefix else "",
        region=region,
        endpoint=endpoint,
    )


def _is_endpoint(text: str) -> bool:
    if not _ENDPOINT.fullmatch(text):
        return False
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode().decode("idna")
        if ":" in host or host.rpartition(".")[2][:1].isdecimal():
            ipaddress.ip_address(host)  # whoever ends in a number has to be an address
    except ValueError:
        return False
    return port != 0


def fetch(
    uri: str,
    *,
    cache_dir: Path | None = None,
    keys: Path | None = None,
    allow_patterns: Sequence[str],
    progress: Progress | None = None,
    settings: SnapshotSettings | None = None,
) -> Path:
    """Return a directory with the model's files, downloaded as far as they are not there.

    Without the store, what was downloaded last is used.

    Args:
        uri: see the head of this file.
        cache_dir: where downloads are kept; default: penstock below the user's cache.
        keys: a directory with the files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary
            keys, AWS_SESSION_TOKEN.
        allow_patterns: which files are taken.
        progress: told as parts are on the disk.
        settings: how files are brought.

    Raises:
        ModelSourceError: the model cannot be had.
    """
    settings = settings or SnapshotSettings()
    location = parse_location(uri)
    root = _root(location, cache_dir, allow_patterns)
    identity = read_keys(keys) if keys is not None else from_environment(os.environ)
    try:
        bucket = Bucket(location, identity)
        try:
            files = bucket.files(allow_patterns)
        except StoreError as error:
            cached = newest(root) if error.is_outage else None
            if cached is None:
                raise
            log.warning("%s does not answer (%s); using what is in the cache", location, error)
            return cached
        return download(root, files, bucket.read, settings=settings, progress=progress)
    except StoreError as error:
        raise ModelSourceError(_explain(error, location)) from error
    except (SnapshotError, OSError) as error:
        raise ModelSourceError(f"the model {location} cannot be downloaded: {error}") from error


def _root(location: Location, cache_dir: Path | None, patterns: Sequence[str]) -> Path:
    """Return where this prefix is kept: its last name, and a hash of all that it depends on."""
    identity = [location.endpoint or "", location.bucket, location.prefix, *sorted(patterns)]
    digest = hashlib.blake2b("\n".join(identity).encode(), digest_size=8).hexdigest()
    name = (location.prefix.rstrip("/") or location.bucket).rpartition("/")[2]
    return (cache_dir or _default_cache()) / "s3" / f"{name[:100]}-{digest}"


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "penstock"


def _explain(error: StoreError, location: Location) -> str:
    """Return what a refusal of the store means for whoever wrote the manifest."""
    if error.code == "NoSuchBucket":
        return f"there is no bucket {location.bucket}; check the name, the endpoint and the region"
    if error.is_redirect or error.code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return (
            f"{location} is not in the region {location.region}: write the bucket's region in "
            "model.s3.region"
        )
    if error.status == 412 or error.code == "NoSuchKey":
        return f"{location} was changed while it was downloaded; it is tried again from the start"
    if error.status in (401, 403):
        return (
            f"{location} may not be read ({error.code or error.status}): check the keys in "
            "model.tokenSecret and what they allow, s3:ListBucket and s3:GetObject"
        )
    return f"the model {location} cannot be downloaded: {error}"
