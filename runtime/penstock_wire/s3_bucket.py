"""A prefix of a bucket in an object store that speaks S3: its files listed, and read in ranges."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from penstock_wire.model_source import ModelSourceError
from penstock_wire.s3_identity import Ambient, Identity, Keys
from penstock_wire.snapshot import Interrupted, RemoteFile

try:
    import obstore
    from obstore.exceptions import BaseError, InvalidPathError
    from obstore.store import S3Store
except ImportError as missing:
    raise ModelSourceError(
        f"s3:// models need the package obstore, which is not installed ({missing}): "
        "install penstock[s3]"
    ) from missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obstore.store import ClientConfig, S3Credential

_MOST_FILES = 10_000
_CHUNK = 1024 * 1024
_LIST_RETRIES = 4
_RETRY_LIMIT = timedelta(minutes=3)
"""After it no further retry begins."""
_CLIENT: ClientConfig = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    # Of a request as a whole, which ends a part that trickles in byte by byte.
    "timeout": timedelta(hours=1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """A prefix of a bucket."""

    bucket: str
    prefix: str
    """Empty, or ending with /."""
    region: str
    endpoint: str | None

    def __str__(self) -> str:
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"s3://{self.bucket}/{self.prefix}{at}"


class Bucket:
    """Reads one prefix. Safe for several threads."""

    def __init__(self, location: Location, identity: Identity) -> None:
        self._location = location
        try:
            self._lists = _connect(location, identity, retries=_LIST_RETRIES)
            # A part that breaks off is tried again by who asked for it, from its start.
            self._reads = _connect(location, identity, retries=0)
        except BaseError as error:
            raise StoreError(error) from error

    def files(self, patterns: Sequence[str]) -> list[RemoteFile]:
        """Return the files below the prefix that match. Raises ModelSourceError if none does."""
        location = self._location
        found: list[RemoteFile] = []
        try:
            entries = obstore.list_with_delimiter(self._lists, location.prefix or None)["objects"]
        except (InvalidPathError, ValueError) as error:
            raise ModelSourceError(
                f"{location} has no files of a model that can be asked for: in the prefix and in "
                f"the keys below it no segment may be empty, . or .. ({StoreError(error)})"
            ) from error
        except (BaseError, FileNotFoundError) as error:
            raise StoreError(error) from error
        for entry in entries:
            # The store's entry for the folder itself has no slash at its end here.
            if not entry["path"].startswith(location.prefix):
                continue
            name = entry["path"].removeprefix(location.prefix)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                found.append(RemoteFile(name, entry["size"], _version(entry["e_tag"], name)))
        if len(found) > _MOST_FILES:
            raise ModelSourceError(f"{location} has more than {_MOST_FILES} files: no model")
        if not found:
            raise ModelSourceError(
                f"{location} has no files of a model; check bucket and prefix, under which "
                "config.json must lie"
            )
        return found

    def read(self, file: RemoteFile, first: int, count: int, /) -> Iterator[bytes]:
        """Give bytes of a file, as long as it is the version that was listed."""
        try:
            answer = obstore.get(
                self._reads,
                f"{self._location.prefix}{file.name}",
                options={"range": (first, first + count), "if_match": file.version},
            )
            yield from answer.stream(_CHUNK)
        except (BaseError, FileNotFoundError) as cause:
            error = StoreError(cause)
            if error.is_outage:
                raise Interrupted(str(error)) from cause
            raise error from cause


class StoreError(Exception):
    """What a request came to. The client tells it in words only, which are taken apart here."""

    _STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
    _CODE = re.compile(r"<Code>(\w{1,64})</Code>")
    _CAUSE = re.compile(r'(?:message|error): "([^"]{1,200})"')
    _MOST = 600

    def __init__(self, error: Exception) -> None:
        text, _, details = str(error).partition("\n\nDebug source:")
        status, code = self._STATUS.search(text), self._CODE.search(text)
        self.status = int(status[1]) if status else None
        self.code = code[1] if code else ""
        self.is_redirect = "Received redirect without LOCATION" in text
        broken = status is None and "HTTP error: " in text
        self.is_outage = broken or (self.status is not None and _may_pass(self.status))
        causes = self._CAUSE.findall(details) if broken else []
        super().__init__(": ".join([text[: self._MOST].strip(), *causes[-1:]]))


def _may_pass(status: int) -> bool:
    return status >= 500 or status == 429


def _version(e_tag: str | None, name: str) -> str:
    if e_tag is None:
        raise ModelSourceError(
            f"the object store lists {name} without an ETag, so a change could not be noticed; "
            "use one that gives ETags"
        )
    return e_tag


def _connect(location: Location, identity: Identity, *, retries: int) -> S3Store:
    url, named_host = address(location)
    return S3Store(
        location.bucket,
        # The URI decides, whatever the environment says of endpoints and signatures.
        config={
            "region": location.region,
            "endpoint": url,
            "aws_endpoint_url_s3": url,
            "virtual_hosted_style_request": named_host,
            "skip_signature": identity is Ambient.NOBODY,
        },
        client_options={**_CLIENT, "allow_http": url.startswith("http://")},
        retry_config={"max_retries": retries, "retry_timeout": _RETRY_LIMIT},
        credential_provider=_Signer(identity) if isinstance(identity, Keys) else None,
    )


def address(location: Location) -> tuple[str, bool]:
    """Return the URL of the bucket's host, and whether the host is named after the bucket.

    Such hosts are Amazon's; other stores seldom have the DNS for them. The certificates of such
    hosts do not cover names with dots.
    """
    if location.endpoint is not None:
        return location.endpoint, False
    china = ".cn" if location.region.startswith("cn-") else ""
    host = f"s3.{location.region}.amazonaws.com{china}"
    named = "." not in location.bucket
    return (f"https://{location.bucket}.{host}", True) if named else (f"https://{host}", False)


@dataclass(frozen=True, slots=True)
class _Signer:
    """Gives the client keys. It would mix those in its own settings with the environment's."""

    keys: Keys

    def __call__(self) -> S3Credential:
        return {
            "access_key_id": self.keys.key_id,
            "secret_access_key": self.keys.secret_key,
            "token": self.keys.session_token,
            "expires_at": None,
        }
