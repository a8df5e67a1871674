"""Bearer keys: who may use the API."""

from __future__ import annotations

import hmac
import logging
import time
from typing import TYPE_CHECKING

from penstock_router.errors import ConfigurationError, Unauthorized
from penstock_router.file_stamp import file_stamp

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""Between two looks at the file: a rotated key counts within a second."""


class KeyFile:
    """The keys in a file, one a line; read again when it changes, so that keys can be rotated.

    A file that becomes unusable keeps the last good keys: a broken mount must not lock everybody
    out, and never lets anybody in.

    Raises:
        ConfigurationError: there is no usable key at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: object = None
        self._looked = 0.0
        self._keys: list[bytes] = []
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the API key file {path} is unusable: {error}; write one key a line"
            ) from error

    def check(self, authorization: str | None) -> None:
        """Raise Unauthorized unless the header's value carries one of the keys."""
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized(
                "no API key was given; send the header 'Authorization: Bearer KEY'",
                code="missing_api_key",
            )
        offered = given.strip().encode()
        # All keys are compared, each in constant time, so that timing tells nothing of any.
        if not sum([hmac.compare_digest(offered, key) for key in self._keys]):
            raise Unauthorized("the API key is wrong", code="invalid_api_key")

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        try:
            self._read()
        except (OSError, ValueError) as error:
            log.warning("the API key file stays as it was: %s", error)

    def _read(self) -> None:
        self._looked = time.monotonic()
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        lines = self._path.read_text(encoding="utf-8").splitlines()
        keys = [line.strip().encode() for line in lines if line.strip()]
        if not keys:
            raise ValueError(f"{self._path} holds no key")
        self._keys = keys
