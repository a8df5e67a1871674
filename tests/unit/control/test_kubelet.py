"""A rendered pod becomes the command that a kubelet would run, with what this machine needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_operator.local.kubelet import (
    Identity,
    Launch,
    Surroundings,
    launch,
    substitute,
    threads_for_workers,
)
from penstock_operator.manifests import Inputs, deployment, prefill_group
from tests.unit.control.samples import service

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_operator.api import InferenceService
    from penstock_operator.labels import Role


def run(chosen: InferenceService, role: Role, root: Path, stage: int = 0) -> Launch:
    workload = (
        prefill_group(chosen, 0, Inputs())
        if role == "prefill"
        else deployment(chosen, role, 1, Inputs())
    )
    identity = Identity(
        name=f"chat-{role}-0", short=f"{role}-0", namespace="default", role=role,
        workload=workload["metadata"]["name"], address="127.0.70.2", stage=stage,
    )  # fmt: skip
    around = Surroundings(
        api=9, hosts_file=root / "hosts", endpoints_file=root / "ends",
        secrets={"chat-keys": root / "keys", "access": root / "access"},
        programs={"penstock-worker": ("py", "worker"), "penstock-router": ("py", "router")},
        threads=3,
    )  # fmt: skip
    return launch(workload["spec"]["template"], identity, around)


def last(argv: tuple[str, ...], flag: str) -> str:
    """Return the value that counts: the last one."""
    return argv[len(argv) - argv[::-1].index(flag)]


def test_a_worker_runs_at_its_own_address(tmp_path: Path) -> None:
    found = run(service(prefill={"pipelineParallel": 2}), "prefill", tmp_path, stage=1)
    assert found.argv[:2] == ("py", "worker")
    assert last(found.argv, "--name") == "chat-prefill-0"
    assert last(found.argv, "--bind") == "127.0.70.2:7000"
    assert last(found.argv, "--stage") == "1"
    assert last(found.argv, "--keys") == str(tmp_path / "keys")
    assert last(found.argv, "--hosts-file") == str(tmp_path / "hosts")
    assert last(found.argv, "--net-device") == "lo"
    assert last(found.argv, "--threads") == "3"
    assert found.readiness.url == "http://127.0.70.2:7001/readyz"
    assert found.group == "chat-prefill-0"


def test_the_manifests_own_cpu_wins_over_the_machines_share(tmp_path: Path) -> None:
    found = run(service(decode={"resources": {"cpu": 2}}), "decode", tmp_path)
    assert [found.argv[i + 1] for i, a in enumerate(found.argv) if a == "--threads"] == ["2"]


def test_the_router_has_its_own_address_and_inherits_the_apis_socket(
    tmp_path: Path,
) -> None:
    found = run(service(router={"apiKeySecret": "access"}), "router", tmp_path)
    assert last(found.argv, "--host") == "127.0.70.2"
    assert last(found.argv, "--port") == "7001"
    assert last(found.argv, "--fd") == "9"
    assert found.inherits == (9,)
    assert last(found.argv, "--discovery") == f"file:{tmp_path / 'ends'}"
    assert last(found.argv, "--api-key-file") == str(tmp_path / "access" / "api-key")
    assert found.readiness.url == "http://127.0.70.2:7001/accepting"
    assert found.end_to_end is not None
    assert found.end_to_end.url == "http://127.0.70.2:7001/ready"
    assert found.control == ""


def test_the_users_own_download_cache_is_used(tmp_path: Path) -> None:
    found = run(service(model={"uri": "hf://a/b"}), "decode", tmp_path)
    assert "HF_HOME" not in found.env
    assert found.env["POD_IP"] == "127.0.70.2"


def test_the_keys_of_an_object_store_are_a_local_directory(tmp_path: Path) -> None:
    model = {"uri": "s3://bucket/m", "tokenSecret": "access"}
    found = run(service(model=model), "decode", tmp_path)
    assert last(found.argv, "--model-token-file") == str(tmp_path / "access")
    assert "XDG_CACHE_HOME" not in found.env


def test_environment_from_a_patch_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "access").mkdir()
    (tmp_path / "access" / "k").write_text("hidden\n")
    env: list[dict[str, Any]] = [
        {"name": "A", "value": "at $(POD_NAME)"},
        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "access", "key": "k"}}},
        {"name": "C", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}},
    ]
    patch = {"spec": {"containers": [{"name": "worker", "env": env}]}}
    found = run(service(decode={"podTemplate": patch}), "decode", tmp_path)
    assert (found.env["A"], found.env["B"]) == ("at chat-decode-0", "hidden")
    assert "C" not in found.env


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A):7000", "1:7000"),
        ("$(A)$(B)", "12"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$A {i} $", "$A {i} $"),
    ],
)
def test_references_are_put_in_as_kubernetes_does(text: str, expected: str) -> None:
    assert substitute(text, {"A": "1", "B": "2"}) == expected


@given(st.text(st.characters(exclude_characters="$"), max_size=30))
def test_text_without_references_stays(text: str) -> None:
    assert substitute(text, {"A": "1"}) == text


@given(st.integers(1, 256), st.integers(0, 64))
def test_threads_never_exceed_the_cores_unless_there_are_too_few(cores: int, workers: int) -> None:
    threads = threads_for_workers(cores, workers)
    assert threads >= 1
    assert threads * workers <= cores or threads == 1
