from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from penstock_router import auth
from penstock_router.auth import KeyFile
from penstock_router.errors import ConfigurationError, Unauthorized
from penstock_router.settings import Settings, in_cluster_api, parse
from tests.unit.router.fake_worker import FakeCluster, decode_worker
from tests.unit.router.harness import serving
from tests.unit.router.tiny_models import write_checkpoint

if TYPE_CHECKING:
    import httpx

NEEDED = [
    "--model",
    "file:///m",
    "--served-model-name",
    "n",
    "--discovery",
    "file:x",
    "--keys",
    "k",
]


def test_flags_become_settings_and_the_last_one_wins() -> None:
    parsed = parse([*NEEDED, "--port", "1", "--require-prefill", "--api-key-file", "a"])
    assert (parsed.port, parsed.require_prefill, parsed.api_key_file) == (1, True, Path("a"))
    again = parse(
        [*NEEDED, "--port", "1", "--require-prefill", "--port", "2", "--no-require-prefill"]
    )
    assert (again.port, again.require_prefill) == (2, False)
    assert again == Settings(
        model="file:///m", served_model_name="n", discovery="file:x", keys=Path("k"), port=2
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["--port", "70000"],
        ["--max-queue", "0"],
        ["--drain-seconds", "0"],
        ["--log-level", "loud"],
        ["--wake", "router=x"],
        ["--wake", "decode=X"],
        ["--wake", "decode"],
        ["--wake", "decode=chat-decode"],
        ["--wake-seconds", "-1"],
    ],
)
def test_impossible_values_name_the_flag(wrong: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=wrong[0]):
        parse([*NEEDED, *wrong])


@pytest.mark.parametrize("wrong", [["--port", "x"], ["--unknown"], ["--por", "1"]])
def test_malformed_flags_end_the_process(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*NEEDED, *wrong])
    assert caught.value.code == os.EX_CONFIG
    assert wrong[0] in capsys.readouterr().err


def test_wake_is_a_list() -> None:
    cluster = ["--discovery", "kubernetes:n/a=b"]
    parsed = parse([*NEEDED, *cluster, "--wake", "prefill=c-prefill", "--wake", "decode=c-decode"])
    assert parsed.scalers == {"decode": "c-decode", "prefill": "c-prefill"}
    assert parse(NEEDED).scalers == {}


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        (
            {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"},
            "https://10.96.0.1:6443",
        ),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1"}, "https://[fd00::1]:443"),
    ],
)
def test_a_pod_is_told_where_the_api_is(environment: dict[str, str], url: str | None) -> None:
    assert in_cluster_api(environment) == url


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--worker-wait-seconds" in text
    assert "Default: 30.0" in text


def test_keys_are_checked_and_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_LOOK_SECONDS", 0.0)
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n\n")
    keys = KeyFile(path)
    for good in ("Bearer one", "bearer two"):
        keys.check(good)
    for bad in (None, "", "Bearer", "Bearer three", "Basic one", "one", "Bearer one two"):
        with pytest.raises(Unauthorized):
            keys.check(bad)
    replacement = tmp_path / "new"
    replacement.write_text("three")
    replacement.replace(path)
    keys.check("Bearer three")
    with pytest.raises(Unauthorized):
        keys.check("Bearer one")
    path.write_text("")
    keys.check("Bearer three")
    path.unlink()
    keys.check("Bearer three")


def test_a_key_file_without_keys_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unusable"):
        KeyFile(tmp_path / "absent")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigurationError, match="holds no key"):
        KeyFile(tmp_path / "empty")


async def test_the_api_asks_for_the_key_and_probes_do_not(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret")
    checkpoint = write_checkpoint(tmp_path / "model")
    async with serving(FakeCluster(decode_worker()), checkpoint, keys=KeyFile(path)) as service:
        await service.until_ready()

        async def status(where: str, key: str | None) -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await service.http.get(where, headers=headers)

        for key in (None, "wrong"):
            answer = await status("/v1/models", key)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        assert (await status("/v1/models", "secret")).status_code == 200
        for where in ("/health", "/ready", "/accepting", "/metrics"):
            assert (await status(where, None)).status_code == 200
