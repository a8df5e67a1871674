"""Model URIs, with the hub's HTTP API played by a small server on the loopback address."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

from penstock_wire.model_source import ModelSourceError, parse_hub, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"vocab_size": 7}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"\x00" * 50_000,
    "README.md": b"nobody needs it",
    "original/consolidated.pth": b"nor that",
}


class Hub(ThreadingHTTPServer):
    """What snapshot_download needs: revision, tree, HEAD and GET of files, errors by header."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {"org/open": FILES, "org/gated": FILES, "org/private": FILES, "org/none": {}}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self) -> set[str]:
        """Files whose content was sent."""
        marker = f"/resolve/{COMMIT}/"
        return {
            unquote(path.partition(marker)[2])
            for method, path, _ in self.requests
            if method == "GET" and marker in path
        }


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("authorization")
        self.server.requests.append((method, path, token))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        refusal = self._refusal(repository, token)
        if refusal is not None:
            self._reply(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
        elif rest[:1] == ["revision"]:
            self._revision(repository, rest[1])
        elif rest[:1] == ["tree"]:
            self._tree(repository)
        elif rest[:1] == ["resolve"]:
            self._file(repository, "/".join(rest[2:]))
        else:
            self._reply(404, b"{}", {})

    def _refusal(self, repository: str, token: str | None) -> tuple[int, str] | None:
        if repository not in self.server.files:
            return (401, "RepoNotFound")
        if repository == "org/gated" and token != "Bearer good":
            return (403, "GatedRepo")
        if repository == "org/private" and token != "Bearer good":
            return (401, "RepoNotFound")
        return None

    def _revision(self, repository: str, revision: str) -> None:
        if revision not in {"main", "v1", COMMIT}:
            self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.server.files[repository]]
        body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        self._reply(200, json.dumps(body).encode(), {})

    def _tree(self, repository: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.server.files[repository].items()
        ]
        self._reply(200, json.dumps(entries).encode(), {})

    def _file(self, repository: str, name: str) -> None:
        data = self.server.files[repository].get(name)
        if data is None:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._reply(200, data, headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_directory_is_used_where_it_lies(tmp_path: Path) -> None:
    directory = tmp_path / "my model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    assert resolve(f"file://{directory}") == directory
    assert resolve(f"file://{tmp_path}/my%20model") == directory


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("file:///nowhere/at/all", "/nowhere/at/all is not there"),
        ("file://relative/path", "three slashes"),
        ("/some/where", "did you mean file:///some/where"),
        ("gs://bucket/model", "not known"),
        ("s3:///model", "malformed"),
        ("hf://only-one-part", "malformed"),
        ("hf://a/b/c", "malformed"),
        ("hf://a/../b", "malformed"),
        ("hf://a/b@", "malformed"),
    ],
)
def test_bad_uris_say_what_to_write(uri: str, text: str) -> None:
    with pytest.raises(ModelSourceError, match=text):
        resolve(uri)


def test_a_directory_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        resolve(f"file://{tmp_path}")
    (tmp_path / "file").touch()
    with pytest.raises(ModelSourceError, match="a file, not a directory"):
        resolve(f"file://{tmp_path}/file")


def test_hub_uris() -> None:
    assert parse_hub("hf://org/name") == ("org/name", None)
    assert parse_hub("hf://Org-1/na.me_2@refs/pr/3") == ("Org-1/na.me_2", "refs/pr/3")


def test_a_model_is_downloaded_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    uri = "hf://org/open@v1"
    found = resolve(
        uri,
        cache_dir=tmp_path,
        endpoint=hub.url,
        progress=lambda done, total: told.append((done, total)),
    )
    needed = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in found.iterdir()} == needed
    assert (found / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.downloaded() == needed
    assert told
    assert told[-1][0] == told[-1][1] == sum(len(FILES[name]) for name in needed)
    assert all(token is None for _, _, token in hub.requests)
    hub.requests.clear()
    assert resolve(uri, cache_dir=tmp_path, endpoint=hub.url) == found
    assert hub.downloaded() == set()


def test_the_router_takes_no_weights(hub: Hub, tmp_path: Path) -> None:
    found = resolve(
        "hf://org/open", cache_dir=tmp_path, endpoint=hub.url, allow_patterns=("*.json",)
    )
    assert (found / "tokenizer.json").is_file()
    assert hub.downloaded() == {"config.json", "tokenizer.json"}


def test_the_token_is_sent_and_its_absence_explained(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="is gated"):
        resolve("hf://org/gated", cache_dir=tmp_path, endpoint=hub.url)
    with pytest.raises(ModelSourceError, match="give a token"):
        resolve("hf://org/private", cache_dir=tmp_path, endpoint=hub.url)
    token_file = tmp_path / "token"
    token_file.write_text("good\n")
    for repository in ("gated", "private"):
        found = resolve(
            f"hf://org/{repository}", cache_dir=tmp_path, endpoint=hub.url, token_file=token_file
        )
        assert (found / "config.json").is_file()
    assert resolve("hf://org/gated", cache_dir=tmp_path, endpoint=hub.url, token="good").is_dir()


def test_what_is_missing_is_named(hub: Hub, tmp_path: Path) -> None:
    for uri, text in [
        ("hf://org/absent", "org/absent is not on the hub"),
        ("hf://org/open@v2", "no revision 'v2'"),
        ("hf://org/none", r"no config\.json"),
    ]:
        with pytest.raises(ModelSourceError, match=text):
            resolve(uri, cache_dir=tmp_path, endpoint=hub.url)
    with pytest.raises(ModelSourceError, match="cannot be read"):
        resolve("hf://org/open", token_file=tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(ModelSourceError, match="is empty"):
        resolve("hf://org/open", token_file=tmp_path / "empty")


def test_without_the_hub_the_cache_is_used(hub: Hub, tmp_path: Path) -> None:
    found = resolve("hf://org/open", cache_dir=tmp_path, endpoint=hub.url)
    nobody = "http://127.0.0.1:9"
    assert resolve("hf://org/open", cache_dir=tmp_path, endpoint=nobody) == found
    with pytest.raises(ModelSourceError, match="cannot be reached"):
        resolve("hf://org/open", cache_dir=tmp_path / "other", endpoint=nobody)


def test_a_directory_that_may_not_be_entered_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ModelSourceError, match=r"let user \d+ enter it"):
        resolve(f"file://{tmp_path}/model")
