"""As whom an object store is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock_wire.model_source import ModelSourceError
from penstock_wire.s3_identity import Ambient, Keys, from_environment, read_keys

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
WEB = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/models"}
TASK = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/task"}
POD = {
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/token",
}


@pytest.fixture
def absent(tmp_path: Path) -> dict[str, str]:
    return {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "absent")}


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "credentials"
    path.write_text(
        "[default]\naws_access_key_id = default-id\naws_secret_access_key = a%b\n"
        "[models]\naws_access_key_id=models-id\naws_secret_access_key=s\naws_session_token=t\n"
        "[half]\naws_access_key_id=half-id\n"
        "[roles]\nrole_arn=arn\n"
    )
    return {"AWS_SHARED_CREDENTIALS_FILE": str(path)}


def test_variables_win_over_all_else(credentials: dict[str, str]) -> None:
    everything = {**credentials, **WEB, **TASK, **POD, **KEYS}
    assert from_environment(everything) == Keys("id", "secret", None)
    everything["AWS_SESSION_TOKEN"] = "token"
    assert from_environment(everything) == Keys("id", "secret", "token")


def test_a_workload_identity_is_left_to_the_client(
    absent: dict[str, str], credentials: dict[str, str]
) -> None:
    assert from_environment({**credentials, **WEB}) is Ambient.WORKLOAD
    assert from_environment({**absent, **TASK}) is Ambient.WORKLOAD
    assert from_environment({**absent, **POD}) is Ambient.WORKLOAD


@pytest.mark.parametrize("name", [*WEB, *POD])
def test_half_of_a_workload_identity_is_none(absent: dict[str, str], name: str) -> None:
    assert from_environment({**absent, name: "value"}) is Ambient.NOBODY


def test_without_anything_requests_are_anonymous(absent: dict[str, str]) -> None:
    assert from_environment(absent) is Ambient.NOBODY
    assert from_environment({**absent, **dict.fromkeys(KEYS, "")}) is Ambient.NOBODY


def test_the_keys_of_a_profile_are_read(credentials: dict[str, str]) -> None:
    assert from_environment({**credentials, **TASK}) == Keys("default-id", "a%b", None)
    assert from_environment({**credentials, "AWS_PROFILE": "models"}) == Keys("models-id", "s", "t")


def test_the_file_in_the_home_directory_is_the_default(
    tmp_path: Path, credentials: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_environment({}) is Ambient.NOBODY
    (tmp_path / ".aws").mkdir()
    (tmp_path / "credentials").rename(tmp_path / ".aws" / "credentials")
    assert from_environment({}) == Keys("default-id", "a%b", None)


@pytest.mark.parametrize("profile", ["roles", "nobody"])
def test_a_profile_without_keys_is_told(credentials: dict[str, str], profile: str) -> None:
    with pytest.raises(ModelSourceError, match=rf"profile {profile}.*has no keys.*AWS_ACCESS_KEY"):
        from_environment({**credentials, "AWS_PROFILE": profile})


def test_half_of_the_keys_is_told(credentials: dict[str, str], absent: dict[str, str]) -> None:
    with pytest.raises(ModelSourceError, match=r"the profile half.*AWS_SECRET_ACCESS_KEY"):
        from_environment({**credentials, "AWS_PROFILE": "half"})
    with pytest.raises(ModelSourceError, match="the environment must give AWS_ACCESS_KEY_ID"):
        from_environment({**absent, "AWS_SECRET_ACCESS_KEY": "secret"})


@pytest.mark.parametrize("text", ["aws_access_key_id=1\n", "[default\n"])
def test_a_malformed_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "credentials"
    path.write_text(text)
    with pytest.raises(ModelSourceError, match="mend the file"):
        from_environment({"AWS_SHARED_CREDENTIALS_FILE": str(path)})


def test_empty_files_are_no_keys(tmp_path: Path) -> None:
    for name in KEYS:
        (tmp_path / name).write_text("\n")
    with pytest.raises(ModelSourceError, match="must give AWS_ACCESS_KEY_ID"):
        read_keys(tmp_path)
