"""The local executor on real processes: it starts, restarts, scales, rolls and ends them all."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.integration.local.conftest import (
    Local,
    alive,
    eventually,
    free_port,
    gone,
    kill,
    wait_end,
)

pytestmark = pytest.mark.timeout(150)


def fetch(address: str, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_up_serves_and_ctrl_c_leaves_nothing_behind(local: Local) -> None:
    supervisor = local.up()
    local.wait_ready()
    pods = {pod["name"]: pod for pod in local.pods()}
    assert list(pods) == ["prefill-0-0", "prefill-0-1", "decode-0", "router-0"]
    hosts = {pod["http"].partition(":")[0] for pod in pods.values()}
    assert len(hosts) == 4, "each pod has an address of its own"
    _check_worker_command(local, pods["prefill-0-1"])
    _check_endpoints(local, pods)
    assert local.run("get")[1].splitlines()[1].split()[:7] == [
        "test", "tiny", "True", "AllReady", "1/1", "1/1", "1/1",
    ]  # fmt: skip
    assert "GangIncomplete" not in local.run("describe")[1]

    pids = local.pids()
    supervisor.send_signal(signal.SIGINT)
    code, output = wait_end(supervisor)
    assert code == 0, output
    assert f"curl http://127.0.0.1:{local.port}/v1/chat/completions" in output
    assert "decode-0      | drained" in output
    assert alive(pids) == []
    assert local.run("get", "--name", "test")[0] == 3


def _check_worker_command(local: Local, stage: dict[str, Any]) -> None:
    argv = fetch(stage["http"], "/argv")[1]["argv"]
    said = {flag: argv[argv.index(flag) + 1] for flag in argv if flag.startswith("--")}
    assert said["--name"] == "test-prefill-0-1"
    assert (said["--stage"], said["--stages"]) == ("1", "2")
    assert said["--bind"] == stage["address"]
    assert said["--peers"] == "test-prefill-0-{i}.test-workers.default.svc:7000"
    assert int(said["--threads"]) >= 1
    keys = Path(said["--keys"])
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}
    names = json.loads(Path(said["--hosts-file"]).read_text())
    assert names["test-prefill-0-1.test-workers.default.svc"] == stage["address"].split(":")[0]


def _check_endpoints(local: Local, pods: dict[str, dict[str, Any]]) -> None:
    listed = json.loads((local.root / "test" / "endpoints.json").read_text())["endpoints"]
    assert [(e["name"], e["role"], e["group"], e["stage"]) for e in listed] == [
        ("test-prefill-0-0", "prefill", "test-prefill-0", 0),
        ("test-prefill-0-1", "prefill", "test-prefill-0", 1),
        ("test-decode-0", "decode", "", 0),
    ]
    assert listed[2]["address"] == pods["decode-0"]["address"]


def test_pods_die_with_a_killed_supervisor_and_the_next_up_works(local: Local) -> None:
    supervisor = local.up()
    local.wait_ready()
    pids = local.pids()
    supervisor.kill()
    supervisor.wait()
    eventually("all pods are gone", lambda: not alive(pids))
    assert local.run("get")[1].startswith("no service runs here")
    local.up()
    local.wait_ready()
    assert not set(local.pids().values()) & set(pids.values())


def test_a_killed_pod_is_started_again(local: Local) -> None:
    local.up()
    local.wait_ready()
    before = local.pids()
    kill(before["decode-0"])
    eventually(
        "another process is ready in its place",
        lambda: (
            local.pids().get("decode-0", before["decode-0"]) != before["decode-0"]
            and local.is_settled()
        ),
    )
    after = local.pids()
    assert {n: p for n, p in after.items() if n != "decode-0"} == {
        n: p for n, p in before.items() if n != "decode-0"
    }
    assert next(pod["restarts"] for pod in local.pods() if pod["name"] == "decode-0") == 1


def test_a_crash_is_told_with_exit_code_and_last_line_and_heals(local: Local) -> None:
    cure = local.root.parent / "cure"
    local.write(decode={"extraArgs": ["--fake-crash-until", str(cure)]})
    local.up()
    eventually(
        "it crashed twice",
        lambda: any(pod["restarts"] >= 2 for pod in local.pods()),
    )
    reason = eventually(
        "the crash is told",
        lambda: (
            (c := local.condition("DecodeReady")).get("reason") == "CrashLooping" and c["message"]
        ),
    )
    assert reason == "test-decode-0: exit code 3: RuntimeError: out of pages"
    assert local.condition("Ready")["reason"] == "CrashLooping"
    assert local.condition("Degraded")["status"] == "True"
    cure.touch()
    local.wait_ready()
    assert local.condition("Degraded")["status"] == "False"


def test_loading_is_told_with_its_progress(local: Local) -> None:
    local.write(decode={"extraArgs": ["--fake-load", "4"]})
    supervisor = local.up()
    told = eventually(
        "loading is told",
        lambda: (c := local.condition("ModelReady")).get("reason") == "ModelLoading" and c,
    )
    assert "loading weights" in told["message"]
    local.wait_ready()
    supervisor.send_signal(signal.SIGTERM)
    assert "test-decode-0: loading weights" in wait_end(supervisor)[1]


def test_scaling_up_and_down_keeps_the_others(local: Local) -> None:
    local.up()
    local.wait_ready()
    before = local.pids()
    assert local.run("scale", "decode=3")[0] == 0
    eventually("three decode workers", lambda: _counts(local)["decode"] == "3/3")
    local.wait_ready()
    assert before.items() <= local.pids().items()
    assert local.run("scale", "decode=1", "prefill=2")[0] == 0
    eventually(
        "one decode worker and two groups",
        lambda: len(local.pids()) == 6 and _counts(local) == {"prefill": "2/2", "decode": "1/1"},
    )
    assert local.pids()["prefill-0-0"] == before["prefill-0-0"]
    assert local.run("scale", "decode=0")[0] == 2


def _counts(local: Local) -> dict[str, str]:
    status = local.resource()["status"]
    return {
        role: f"{status[role]['ready']}/{status[role]['replicas']}"
        for role in ("prefill", "decode")
    }


def test_a_changed_manifest_rolls_without_an_unready_moment(local: Local) -> None:
    local.up()
    local.wait_ready()
    before = local.pids()
    answers: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.02):
            answers.append(fetch(f"127.0.0.1:{local.port}", "/ready")[0])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        changed = {"extraArgs": ["--fake-drain", "0.5"]}
        local.write(prefill={"pipelineParallel": 2, **changed}, decode=changed)
        assert local.run("apply", "-f", str(local.manifest))[1] == "test configured\n"
        eventually(
            "every worker is a new one",
            lambda: (
                local.is_settled()
                and not {p for n, p in before.items() if n != "router-0"}
                & set(local.pids().values())
            ),
        )
    finally:
        done.set()
        asking.join()
    assert set(answers) == {200}
    assert len(answers) > 10
    assert local.pids()["router-0"] == before["router-0"], "its pods did not change"
    eventually("the old ones are gone", lambda: len(alive(before)) == 1)
    assert local.run("apply", "-f", str(local.manifest))[1] == "test unchanged\n"


def test_a_new_router_takes_over_without_a_gap(local: Local) -> None:
    """It starts before the old one drains, and what neither has accepted waits in the kernel."""
    local.up()
    local.wait_ready()
    before = local.pids()
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.01):
            statuses.append(fetch(f"127.0.0.1:{local.port}", "/health")[0])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        local.write(kvCache={"pageSize": 16}, router={"extraArgs": ["--fake-drain", "0.1"]})
        assert local.run("apply", "-f", str(local.manifest))[0] == 0
        eventually(
            "all of it is new",
            lambda: local.is_settled() and not set(before.values()) & set(local.pids().values()),
        )
    finally:
        done.set()
        asking.join()
    assert set(statuses) == {200}, "a connection that was refused or broken raises"
    assert len(statuses) > 10
    assert fetch(f"127.0.0.1:{local.port}", "/ready")[0] == 200


def test_clients_wait_in_the_kernel_while_a_killed_router_restarts(local: Local) -> None:
    local.up()
    local.wait_ready()
    before = local.pids()["router-0"]
    kill(before)
    eventually("the router is gone", lambda: gone(before))
    status, body = fetch(f"127.0.0.1:{local.port}", "/health")
    assert status == 200
    assert body["pid"] != before


def test_down_ends_stubborn_pods_and_their_children(local: Local) -> None:
    local.write(decode={"extraArgs": ["--fake-stubborn", "--fake-child"]})
    supervisor = local.up("--grace", "1")
    local.wait_ready()
    pids = local.pids()
    child = int(local.run("logs", "decode")[1].split("child ")[1].split()[0])
    assert not gone(child)
    kill(pids["prefill-0-0"], signal.SIGSTOP)
    assert local.run("down", "--grace", "1") == (0, "test has ended\n")
    assert wait_end(supervisor)[0] == 0
    assert alive({**pids, "child": child}) == []
    assert local.run("down")[0] == 3


def test_a_second_signal_ends_at_once(local: Local) -> None:
    local.write(decode={"extraArgs": ["--fake-stubborn"]})
    supervisor = local.up("--grace", "600")
    local.wait_ready()
    pids = local.pids()
    assert local.run("down", "--now", "--grace", "10")[0] == 0
    assert wait_end(supervisor)[0] == 0
    assert alive(pids) == []


def test_a_second_up_says_what_runs_and_how_to_stop_it(local: Local) -> None:
    supervisor = local.up()
    local.wait_ready()
    code, output = local.run(*local.up_arguments())
    assert code == 1
    assert f"the service test runs already (pid {supervisor.pid})" in output
    assert "penstock down --name test" in output
    assert local.is_ready(), "the running one is not disturbed"


def test_a_port_in_use_is_refused_with_a_remedy(local: Local) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", local.port))
        other.listen()
        code, output = local.run(*local.up_arguments())
    assert code == 1
    assert f"127.0.0.1:{local.port} is in use by another program" in output
    assert f"--port {local.port + 1}" in output
    assert local.run("get")[1].startswith("no service runs here")


def test_two_services_run_side_by_side(local: Local) -> None:
    local.up()
    local.wait_ready()
    first = {pod["http"].partition(":")[0] for pod in local.pods() if pod["role"] != "router"}
    local.name, local.port = "other", free_port()
    local.write()
    local.up()
    eventually("both are ready", lambda: local.run("get")[1].count(" True ") == 2)
    code, output = local.run("ps")
    assert code == 3
    assert "other, test" in output
    pods = json.loads(local.run("ps", "--name", "other", "-o", "json")[1])
    assert not first & {pod["http"].partition(":")[0] for pod in pods}


def test_detached_it_returns_when_ready_and_asks_for_its_api_key(local: Local) -> None:
    local.write(router={"apiKeySecret": "access"})
    done = subprocess.run(
        [sys.executable, "-m", "penstock_operator.cli", *local.up_arguments("-d")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stderr
        key_file = local.root / "test" / "secrets" / "access" / "api-key"
        assert f"Bearer $(cat {key_file})" in done.stdout
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        argv = fetch(f"127.0.0.1:{local.port}", "/argv")[1]["argv"]
        assert argv[argv.index("--api-key-file") + 1] == str(key_file)
    finally:
        assert local.run("down")[0] == 0
