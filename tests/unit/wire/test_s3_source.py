"""Models in an object store: a real S3 server (moto's) behind a proxy that can break answers."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest

from penstock_wire import s3_bucket, s3_source
from penstock_wire.model_source import PATTERNS, ModelSourceError, resolve
from penstock_wire.snapshot import SnapshotSettings
from tests.unit.wire import s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.wire.s3_server import Admin

FILES = {
    "config.json": b'{"vocab_size": 7}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(range(256)) * 1000,
    "README.md": b"nobody needs it",
    "original/config.json": b"nor that",
}
NEEDED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
METADATA = "/metadata"
IDENTITY = "/identity"
POD_KEYS = {
    "AccessKeyId": "PODKEY",
    "SecretAccessKey": "hidden",
    "Token": "pod-token",
    "Expiration": "2099-01-01T00:00:00Z",
}
SMALL_PARTS = SnapshotSettings(part_bytes=50_000, parallel=4, attempts=3, first_wait_seconds=0.01)


class Store(ThreadingHTTPServer):
    """Passes requests on to the S3 server; `faults` are for its answers to GETs of a path."""

    daemon_threads = True

    def __init__(self, origin: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin = origin
        self.requests: list[tuple[str, str | None, str | None]] = []
        """Path, range and signature of each."""
        self.tokens: set[str | None] = set()
        """Session tokens that came."""
        self.faults: dict[str, list[str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def uri(self, path: str) -> str:
        return f"s3://{path}?{urlencode({'region': 'eu-central-1', 'endpoint': self.url})}"

    def ranges(self, name: str) -> list[str | None]:
        return [asked for path, asked, _ in self.requests if path == f"/models/tiny/{name}"]


class _Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        headers = dict(self.headers.items())
        signature = self.headers.get("Authorization")
        self.server.requests.append((path, self.headers.get("Range"), signature))
        if path == IDENTITY:
            body = json.dumps(POD_KEYS).encode()
            self._answer(200, {"Content-Length": str(len(body))}, body)
            return
        self.server.tokens.add(self.headers.get("x-amz-security-token"))
        faults = self.server.faults.get(path)
        fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            self._answer(int(fault), {"Content-Length": "0"}, b"")
            return
        if fault == "drop":
            self.close_connection = True
            return
        connection = http.client.HTTPConnection(*self.server.origin, timeout=10)
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if fault == "no ETags":
            body = re.sub(rb"<ETag>.*?</ETag>", b"", body)
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        }
        kept["Content-Length"] = str(len(body))
        if fault == "cut":
            self.close_connection = True
            body = body[: len(body) // 2]
        self._answer(answer.status, kept, body)

    def do_PUT(self) -> None:  # what the machine's metadata service is asked with first
        self.do_GET()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def server() -> Iterator[Admin]:
    with s3_server.running() as admin:
        yield admin


@pytest.fixture
def admin(server: Admin) -> Iterator[Admin]:
    """A server with a model in it."""
    server.make_bucket("models")
    put(server, FILES)
    yield server
    server.reset()


@pytest.fixture
def store(admin: Admin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """What stands before the server. Nothing of the user's own configuration is seen."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    origin = urlsplit(admin.url)
    assert origin.hostname is not None
    assert origin.port is not None
    with Store((origin.hostname, origin.port)) as server:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"{server.url}{METADATA}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put(admin: Admin, files: dict[str, bytes], *, acl: str = "public-read") -> None:
    for name, data in files.items():
        admin.put("models", f"tiny/{name}", data, acl=acl)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wanted() -> dict[str, bytes]:
    return {name: FILES[name] for name in NEEDED}


def test_a_model_is_downloaded_once_and_only_what_is_needed(store: Store, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = resolve(
        store.uri("models/tiny"),
        cache_dir=tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )
    assert contents(found) == wanted()
    total = sum(map(len, wanted().values()))
    assert told[-1] == (total, total)
    assert {signature for _, _, signature in store.requests} == {None}
    store.requests.clear()
    assert resolve(store.uri("models/tiny/"), cache_dir=tmp_path) == found
    assert [path for path, _, _ in store.requests] == ["/models"]


def test_the_router_takes_no_weights(store: Store, tmp_path: Path) -> None:
    found = resolve(store.uri("models/tiny"), cache_dir=tmp_path, allow_patterns=("*.json",))
    assert set(contents(found)) == {"config.json", "tokenizer.json"}
    assert store.ranges("model.safetensors") == []


def test_files_come_in_ranges_and_survive_broken_answers(store: Store, tmp_path: Path) -> None:
    weights = "/models/tiny/model.safetensors"
    store.faults = {"/models": ["503"], weights: ["cut", "503", "cut"]}
    found = s3_source.fetch(
        store.uri("models/tiny"),
        cache_dir=tmp_path,
        allow_patterns=PATTERNS,
        settings=SMALL_PARTS,
    )
    assert contents(found) == wanted()
    asked = store.ranges("model.safetensors")
    assert set(asked) == {
        "bytes=0-49999",
        "bytes=50000-99999",
        "bytes=100000-149999",
        "bytes=150000-199999",
        "bytes=200000-249999",
        "bytes=250000-255999",
    }
    assert len(asked) == 6 + 3


def test_a_download_goes_on_where_it_was_broken_off(store: Store, tmp_path: Path) -> None:
    weights = "/models/tiny/model.safetensors"
    one_by_one = SnapshotSettings(
        part_bytes=50_000, parallel=1, attempts=1, first_wait_seconds=0.01
    )
    arguments: dict[str, Any] = {
        "cache_dir": tmp_path,
        "allow_patterns": ("model.safetensors",),
        "settings": one_by_one,
    }
    store.faults = {weights: ["", "", "", "cut"]}
    with pytest.raises(ModelSourceError, match=r"model\.safetensors did not come"):
        s3_source.fetch(store.uri("models/tiny"), **arguments)
    store.requests.clear()
    found = s3_source.fetch(store.uri("models/tiny"), **arguments)
    assert contents(found) == {"model.safetensors": FILES["model.safetensors"]}
    assert store.ranges("model.safetensors") == [
        "bytes=150000-199999",
        "bytes=200000-249999",
        "bytes=250000-255999",
    ]


def test_keys_sign_every_request(store: Store, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    uri = store.uri("models/tiny")
    (keys / "AWS_ACCESS_KEY_ID").write_text("AKIDEXAMPLE\n")
    with pytest.raises(ModelSourceError, match="AWS_SECRET_ACCESS_KEY"):
        resolve(uri, cache_dir=tmp_path, token_file=keys)
    (keys / "AWS_SECRET_ACCESS_KEY").write_text("hidden\n")
    resolve(uri, cache_dir=tmp_path, token_file=keys)
    assert store.requests
    for _, _, signature in store.requests:
        assert signature is not None
        assert "AKIDEXAMPLE" in signature
        assert "/eu-central-1/s3/" in signature


def test_keys_of_files_are_not_mixed_with_the_environment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "AWS_ACCESS_KEY_ID").write_text("AKIDEXAMPLE\n")
    (keys / "AWS_SECRET_ACCESS_KEY").write_text("hidden\n")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "OTHER",
        "AWS_SESSION_TOKEN": "other",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_REGION": "mars-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
    }.items():
        monkeypatch.setenv(name, value)
    resolve(store.uri("models/tiny"), cache_dir=tmp_path, token_file=keys)
    assert all("AKIDEXAMPLE" in (signature or "") for _, _, signature in store.requests)
    assert store.tokens == {None}
    (keys / "AWS_SESSION_TOKEN").write_text("temporary\n")
    resolve(store.uri("models/tiny"), cache_dir=tmp_path, token_file=keys)
    assert "temporary" in store.tokens


def test_the_keys_of_the_environment_sign(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    assert all("AKIDEXAMPLE" in (signature or "") for _, _, signature in store.requests)
    assert store.tokens == {"temporary"}


def test_the_identity_of_the_pod_signs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("who-i-am")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{store.url}{IDENTITY}")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
    resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    assert (IDENTITY, None, "who-i-am") in store.requests
    assert store.tokens == {"pod-token"}


@pytest.mark.parametrize("half", ["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_ROLE_ARN"])
def test_the_node_is_never_asked_for_its_identity(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setenv(half, f"{store.url}{IDENTITY}")
    resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    assert {signature for _, _, signature in store.requests} == {None}
    assert not any(path.startswith((METADATA, IDENTITY)) for path, _, _ in store.requests)


def test_a_changed_model_is_fetched_anew(store: Store, admin: Admin, tmp_path: Path) -> None:
    before = resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    put(admin, {"model.safetensors": b"new"})
    after = resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    assert after != before
    assert (after / "model.safetensors").read_bytes() == b"new"
    assert contents(before) == wanted()


def test_a_change_during_the_download_is_not_mixed_in(
    store: Store, admin: Admin, tmp_path: Path
) -> None:
    changed = threading.Event()

    def change(done: int, total: int) -> None:
        if done > 0 and not changed.is_set():
            changed.set()
            put(admin, {"model.safetensors": bytes(256_000)})

    arguments: dict[str, Any] = {
        "cache_dir": tmp_path,
        "allow_patterns": ("model.safetensors",),
        "settings": SnapshotSettings(part_bytes=50_000, parallel=1),
    }
    with pytest.raises(ModelSourceError, match="was changed while it was downloaded"):
        s3_source.fetch(store.uri("models/tiny"), progress=change, **arguments)
    found = s3_source.fetch(store.uri("models/tiny"), **arguments)
    assert contents(found) == {"model.safetensors": bytes(256_000)}


@pytest.mark.parametrize("fault", ["503", "drop", "cut"])
def test_without_the_store_the_cache_is_used(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    found = resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    store.faults = {"/models": [fault] * 5}
    assert resolve(store.uri("models/tiny"), cache_dir=tmp_path) == found
    assert "using what is in the cache" in caplog.text
    store.faults = {"/models": [fault] * 5}
    with pytest.raises(ModelSourceError, match="cannot be downloaded"):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path / "other")


def test_a_store_that_is_not_there_is_told_with_the_cause(store: Store, tmp_path: Path) -> None:
    uri = store.uri("models/tiny")
    store.socket.close()
    with pytest.raises(ModelSourceError, match=r"cannot be downloaded.*Connection refused"):
        resolve(uri, cache_dir=tmp_path)


@pytest.mark.parametrize("status", ["400", "403"])
def test_a_refusal_is_no_outage(store: Store, tmp_path: Path, status: str) -> None:
    resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    store.faults = {"/models": [status]}
    with pytest.raises(ModelSourceError, match=status):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path)


def test_another_region_is_told(store: Store, tmp_path: Path) -> None:
    store.faults = {"/models": ["301"]}
    with pytest.raises(ModelSourceError, match=r"not in the region eu-central-1.*model\.s3"):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent/tiny", "there is no bucket absent"),
        ("models/absent", "has no files of a model"),
        ("models/tiny/original/..", "has no files of a model"),
    ],
)
def test_what_is_missing_is_named(store: Store, tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(ModelSourceError, match=reason):
        resolve(store.uri(path), cache_dir=tmp_path)


def test_what_may_not_be_read_is_told_with_what_is_needed(
    store: Store, admin: Admin, tmp_path: Path
) -> None:
    put(admin, {"model.safetensors": b"hidden"}, acl="private")
    with pytest.raises(ModelSourceError, match=r"may not be read.*model\.tokenSecret"):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path)


def test_a_directory_without_a_configuration_is_no_model(
    store: Store, admin: Admin, tmp_path: Path
) -> None:
    admin.delete("models", "tiny/config.json")
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path)


def test_the_entry_of_the_folder_itself_is_no_file(
    store: Store, admin: Admin, tmp_path: Path
) -> None:
    for key, data in {"odd.json/": b"", "odd.json/config.json": b"{}"}.items():
        admin.put("models", key, data)
    found = resolve(store.uri("models/odd.json"), cache_dir=tmp_path)
    assert contents(found) == {"config.json": b"{}"}


def test_a_whole_bucket_is_a_model(store: Store, admin: Admin, tmp_path: Path) -> None:
    admin.make_bucket("whole")
    admin.put("whole", "config.json", b"{}")
    assert contents(resolve(store.uri("whole"), cache_dir=tmp_path)) == {"config.json": b"{}"}


def test_names_are_quoted_on_the_way(store: Store, admin: Admin, tmp_path: Path) -> None:
    admin.put("models", "tiny/a%20%2B%25b.json", b"1")
    found = resolve(store.uri("models/tiny"), cache_dir=tmp_path)
    assert (found / "a +%b.json").read_bytes() == b"1"


def test_without_versions_nothing_is_downloaded(store: Store, tmp_path: Path) -> None:
    store.faults = {"/models": ["no ETags"]}
    with pytest.raises(ModelSourceError, match="without an ETag"):
        resolve(store.uri("models/tiny"), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("uri", "url", "named"),
    [
        ("s3://models/x", "https://models.s3.us-east-1.amazonaws.com", True),
        ("s3://my.models/x?region=eu-west-1", "https://s3.eu-west-1.amazonaws.com", False),
        ("s3://models?region=cn-north-1", "https://models.s3.cn-north-1.amazonaws.com.cn", True),
        ("s3://models?endpoint=http://minio:9000", "http://minio:9000", False),
    ],
)
def test_hosts_are_named_after_buckets_at_amazon_only(uri: str, url: str, named: bool) -> None:
    assert s3_bucket.address(s3_source.parse_location(uri)) == (url, named)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://",
        "http://a b",
        "http://a:99999",
        "http://a:0",
        "http://[",
        "http://[::x]",
        "http://10.0.0.999",
        "http://a.0x1",
        "http://xn--a",
        "http://user:key@a",
        "http://a?b",
        "http://\u00fc.example",
    ],
)
def test_endpoints_that_the_client_cannot_take_are_refused(endpoint: str) -> None:
    with pytest.raises(ModelSourceError, match="is no URL"):
        s3_source.parse_location(f"s3://b/x?{urlencode({'endpoint': endpoint})}")


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://minio:9000",
        "https://store_1.models.svc.cluster.local/base",
        "http://10.0.0.9:9000",
        "http://[fd00::9]:9000",
        "https://xn--bcher-kva.example",
    ],
)
def test_usual_endpoints_are_taken(endpoint: str) -> None:
    location = s3_source.parse_location(f"s3://b/x?{urlencode({'endpoint': endpoint})}")
    assert location.endpoint == endpoint


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///x",
        "s3://b/x?zone=1",
        "s3://b/x?endpoint=minio:9000",
        "s3://b/x?y",
        "s3://a b/x",
        "s3://[x",
        "s3://b@c/x",
    ],
)
def test_malformed_uris_are_refused(uri: str) -> None:
    with pytest.raises(ModelSourceError, match=r"malformed|is no URL"):
        s3_source.parse_location(uri)
