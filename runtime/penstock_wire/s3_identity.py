"""As whom an object store is asked: with keys that are given, as the environment says, as nobody.

The environment is asked in this order:

    variables      AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
    web identity   AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN
    file           AWS_SHARED_CREDENTIALS_FILE, default ~/.aws/credentials: keys of AWS_PROFILE
    container      AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, or AWS_CONTAINER_CREDENTIALS_FULL_URI
                   and AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE

The machine's own identity is never asked for: in a pod that would be the node's.
"""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from penstock_wire.model_source import ModelSourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_ID, SECRET_KEY, SESSION_TOKEN = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Files with keys, named as the variables are that every S3 client reads."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What requests are signed with."""

    key_id: str
    secret_key: str
    session_token: str | None
    """Of temporary keys."""


class Ambient(Enum):
    """Identities without keys of ours."""

    WORKLOAD = "workload"
    """The client gets keys, and renews them, by the variables of the pod or task."""
    NOBODY = "nobody"
    """Requests are not signed."""


Identity: TypeAlias = Keys | Ambient


def read_keys(directory: Path) -> Keys:
    """Return the keys in a directory: a file each. Raises ModelSourceError."""
    try:
        found = {
            name: (directory / name).read_text(encoding="utf-8").strip()
            for name in (KEY_ID, SECRET_KEY, SESSION_TOKEN)
            if name != SESSION_TOKEN or (directory / name).exists()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise ModelSourceError(
            f"the keys of the object store cannot be read: {error}; {directory} must hold the "
            f"files {KEY_ID} and {SECRET_KEY}"
        ) from error
    return _keys(found, f"the files in {directory}")


def from_environment(variables: Mapping[str, str]) -> Identity:
    """Return the first identity that the environment has. Raises ModelSourceError."""
    if variables.get(KEY_ID) or variables.get(SECRET_KEY):
        return _keys(variables, "the environment")
    if _has(variables, "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        return Ambient.WORKLOAD
    keys = _from_file(variables)
    if keys is not None:
        return keys
    # Exactly the variables by which the client does not turn to the machine's metadata service.
    if _has(variables, "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") or _has(
        variables, "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
    ):
        return Ambient.WORKLOAD
    return Ambient.NOBODY


def _has(variables: Mapping[str, str], *names: str) -> bool:
    return all(variables.get(name) for name in names)


def _from_file(variables: Mapping[str, str]) -> Keys | None:
    named = variables.get("AWS_SHARED_CREDENTIALS_FILE")
    path = Path(named).expanduser() if named else Path.home() / ".aws" / "credentials"
    asked = variables.get("AWS_PROFILE")
    profile = asked or "default"
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ModelSourceError(
            f"the keys of the object store cannot be read from {path}: {error}; mend the file, or "
            f"set {KEY_ID} and {SECRET_KEY}"
        ) from error
    section = parser[profile] if parser.has_section(profile) else {}
    found = {name.upper(): value for name, value in section.items()}
    if _has(found, KEY_ID) or _has(found, SECRET_KEY):
        return _keys(found, f"the profile {profile} in {path}")
    if asked:
        raise ModelSourceError(
            f"the profile {asked}, which AWS_PROFILE names, has no keys in {path}: write them "
            f"there, or set {KEY_ID} and {SECRET_KEY}"
        )
    return None


def _keys(found: Mapping[str, str], where: str) -> Keys:
    for name in (KEY_ID, SECRET_KEY):
        if not found.get(name):
            raise ModelSourceError(
                f"the keys of the object store are not whole: {where} must give {name}, too"
            )
    return Keys(found[KEY_ID], found[SECRET_KEY], found.get(SESSION_TOKEN) or None)
