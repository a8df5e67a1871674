"""The service's CURVE key pair: one pair for all processes of one InferenceService.

A server accepts exactly the clients that hold the pair, and a client talks only to a server that
holds it: who lacks the key can neither speak nor listen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

if TYPE_CHECKING:
    from pathlib import Path

SECRET_FILE = "curve.secret"  # noqa: S105 - a file's name
PUBLIC_FILE = "curve.public"


class InvalidKeys(Exception):  # noqa: N818 - it names the state
    """A key directory that cannot be used."""


@dataclass(frozen=True, slots=True)
class Keys:
    """A CURVE key pair, Z85 text of 40 characters each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"

    @classmethod
    def generate(cls) -> Keys:
        """Return a new random pair."""
        public, secret = zmq.curve_keypair()
        return cls(public=public, secret=secret)

    @classmethod
    def load(cls, directory: Path) -> Keys:
        """Read the pair from `directory` (a mounted Secret). Raises InvalidKeys."""
        try:
            public = (directory / PUBLIC_FILE).read_bytes().strip()
            secret = (directory / SECRET_FILE).read_bytes().strip()
        except OSError as error:
            raise InvalidKeys(f"the key pair in {directory} cannot be read: {error}") from error
        try:
            matches = len(secret) == 40 and zmq.curve_public(secret) == public
        except (ValueError, zmq.ZMQError):
            matches = False
        if not matches:
            raise InvalidKeys(
                f"{directory} holds no CURVE key pair: {PUBLIC_FILE} does not belong to "
                f"{SECRET_FILE}; write a new pair and restart every process of the service"
            )
        return cls(public=public, secret=secret)

    def save(self, directory: Path) -> None:
        """Write the pair, readable for the owner alone (directory 0700, files 0600)."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, value in ((PUBLIC_FILE, self.public), (SECRET_FILE, self.secret)):
            path = directory / name
            path.unlink(missing_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(value + b"\n")
