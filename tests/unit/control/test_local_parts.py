"""The local executor's parts, one at a time: lock, addresses, processes, logs, wanted state."""

from __future__ import annotations

import io
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_operator import cli
from penstock_operator.errors import AlreadyRunning, ManifestError, PortInUse, StateError
from penstock_operator.local.desired import (
    Desired,
    local_targets,
    read_desired,
    write_desired,
)
from penstock_operator.local.follow import LogReader
from penstock_operator.local.logs import LineSplitter, LogFile, Terminal
from penstock_operator.local.network import LoopbackNetwork, listen_for_api
from penstock_operator.local.processes import Process, exit_reason, kill_leftover, start_time
from penstock_operator.local.state import StateDir, services
from penstock_operator.local.supervisor import _read_secret
from penstock_operator.local.tables import age_text, example_request, table
from penstock_operator.manifests import Inputs, deployment
from tests.unit.control.samples import ROOT, service

if TYPE_CHECKING:
    from pathlib import Path

# --- state ------------------------------------------------------------------------------------


def test_a_state_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    state = StateDir(tmp_path, "chat")
    with state.owned():
        assert state.owner() == os.getpid()
        with (
            pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"),
            StateDir(tmp_path, "chat").owned(),
        ):
            pass
    assert state.owner() is None
    assert [found.name for found in services(tmp_path)] == ["chat"]


def test_the_lock_of_a_dead_owner_does_not_count_and_its_pid_is_not_believed(
    tmp_path: Path,
) -> None:
    state = StateDir(tmp_path, "chat")
    state.create()
    state.lock_file.write_text(f"{os.getpid()} 1")
    assert state.owner() is None
    with state.owned():
        assert state.owner() == os.getpid()


def test_files_are_private_and_replaced_as_a_whole(tmp_path: Path) -> None:
    state = StateDir(tmp_path, "chat")
    state.create()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    state.write(state.status_file, {"a": 1})
    assert stat.S_IMODE(state.status_file.stat().st_mode) == 0o600
    assert state.read(state.status_file) == {"a": 1}
    assert state.read(state.pods_file) is None
    assert not [path for path in state.path.iterdir() if path.name.startswith(".")]
    state.status_file.write_text("{")
    with pytest.raises(StateError, match="cannot be read"):
        state.read(state.status_file)


# --- what is wanted ---------------------------------------------------------------------------


def test_what_is_wanted_survives_the_disk(tmp_path: Path) -> None:
    state = StateDir(tmp_path, "chat")
    state.create()
    wanted = Desired(manifest=service(prefill={}), scaled={}, generation=1).scale("decode", 3)
    write_desired(state, wanted)
    assert read_desired(state) == wanted
    assert read_desired(state).service.spec.decode.wanted == 3


def test_applying_takes_scaling_back_except_where_the_manifest_leaves_it_open() -> None:
    fixed = Desired(manifest=service(), scaled={}, generation=1).scale("decode", 3)
    assert fixed.apply(service()).scaled == {}
    free = service(decode={"autoscaling": {"maxReplicas": 4}})
    scaled = Desired(manifest=free, scaled={}, generation=1).scale("decode", 3)
    assert scaled.apply(free).scaled == {"decode": 3}
    assert scaled.apply(service(decode={"autoscaling": {"maxReplicas": 2}})).scaled == {}


def test_scaling_what_is_not_there_or_to_nothing_is_refused() -> None:
    wanted = Desired(manifest=service(), scaled={}, generation=1)
    for role, replicas in (("prefill", 1), ("decode", 0)):
        with pytest.raises(ManifestError):
            wanted.scale(role, replicas)  # type: ignore[arg-type]


def test_nothing_sleeps_on_one_machine() -> None:
    asleep = {"autoscaling": {"minReplicas": 0, "maxReplicas": 4}}
    wanted = Desired(manifest=service(prefill=asleep, decode=asleep), scaled={}, generation=1)
    targets = local_targets(wanted.service)
    assert (targets["prefill"].replicas, targets["decode"].replicas) == (1, 1)
    router = deployment(wanted.service, "router", 1, Inputs())
    (container,) = router["spec"]["template"]["spec"]["containers"]
    assert "--wake" not in container["args"], "there is nobody to ask"


def test_a_secret_is_a_file_or_a_directory_of_entries(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text("id")
    (folder / "AWS_SECRET_ACCESS_KEY").write_text("key")
    assert _read_secret("store", folder, "token") == {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
    }
    assert _read_secret("store", folder / "AWS_ACCESS_KEY_ID", "token") == {"token": "id"}
    with pytest.raises(StateError, match="cannot be read"):
        _read_secret("store", tmp_path / "absent", "token")


def test_one_machine_has_one_router_and_its_successor_starts_first() -> None:
    targets = local_targets(service(router={"replicas": 3}))
    assert (targets["router"].replicas, targets["router"].surge) == (1, 1)
    assert targets["prefill"].replicas == 0


# --- addresses --------------------------------------------------------------------------------


def test_networks_do_not_overlap_and_are_given_back() -> None:
    first, second = (LoopbackNetwork.claim("same name", ()) for _ in range(2))
    try:
        one, other = first.allocate(), second.allocate()
        assert one.rpartition(".")[0] != other.rpartition(".")[0]
        assert first.allocate() != one
    finally:
        first.close()
        second.close()
    again = LoopbackNetwork.claim("same name", ())
    assert again.allocate() == one
    again.close()


def test_an_address_is_used_again_only_when_the_others_were() -> None:
    network = LoopbackNetwork.claim("reuse", ())
    try:
        first = network.allocate()
        network.release(first)
        assert network.allocate() != first
    finally:
        network.close()


def test_a_port_taken_on_every_address_is_told() -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        port = everywhere.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)) as caught:
            LoopbackNetwork.claim("chat", (port,))
        assert "ss -ltnp" in caught.value.remedy
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port} is in use"):
            listen_for_api("127.0.0.1", port)
    listen_for_api("127.0.0.1", port).close()


# --- processes --------------------------------------------------------------------------------


async def run(*argv: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    process = Process(argv, {"GREETING": "hello"}, lines.append)
    return await process.wait(), lines


async def test_a_process_tells_lines_and_exit_code() -> None:
    code, lines = await run("/bin/sh", "-c", "echo $GREETING; echo broken >&2; exit 3")
    assert (code, lines) == (3, ["hello", "broken"])
    assert exit_reason(code, lines[-1]) == "exit code 3: broken"


async def test_a_program_that_is_not_there_says_so() -> None:
    code, lines = await run("/nonexistent/program")
    assert code == 127
    assert lines == ["/nonexistent/program cannot be run: No such file or directory"]


async def test_a_crash_is_seen_although_children_hold_the_output_and_they_are_killed() -> None:
    code, lines = await run("/bin/sh", "-c", "sleep 300 & echo $!; exit 7")
    assert code == 7
    assert _ended(int(lines[0]))


def _ended(pid: int) -> bool:
    """Wait for a process that is not ours to reap."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor) as file:
        return bool(select.select([file], [], [], 10)[0])


async def test_killing_is_told_by_the_signals_name() -> None:
    process = Process(["/bin/sleep", "300"], {}, lambda _: None)
    process.kill()
    assert exit_reason(await process.wait(), "") == "killed by SIGKILL"


def test_the_shim_does_not_run_a_program_whose_parent_has_died() -> None:
    shim = ROOT / "operator" / "penstock_operator" / "local" / "exec_shim.py"
    done = subprocess.run(
        [sys.executable, str(shim), "1", "/bin/echo", "ran"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (127, b"")


def test_leftovers_are_known_by_pid_and_start_time() -> None:
    with subprocess.Popen(["/bin/sleep", "300"], start_new_session=True) as process:
        started = start_time(process.pid)
        assert started is not None
        assert not kill_leftover(process.pid, started + 1)
        assert kill_leftover(process.pid, started)
        assert process.wait() == -signal.SIGKILL
    assert not kill_leftover(process.pid, started)


# --- logs -------------------------------------------------------------------------------------


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12)),
    st.integers(1, 5),
)
def test_lines_come_out_whole_whatever_the_pieces(lines: list[str], size: int) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    splitter = LineSplitter()
    found = [
        line
        for start in range(0, len(data), size)
        for line in splitter.feed(data[start : start + size])
    ]
    assert [*found, *splitter.finish()] == lines


def test_progress_bars_and_endless_lines_are_tamed() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"10%\r50%\r100%\ndone") == ["100%"]
    assert splitter.finish() == ["done"]
    assert len(splitter.feed(b"x" * 100_000)) == 1


def test_a_log_file_is_set_aside_when_it_has_grown(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "decode-0.log", limit=50)
    for number in range(20):
        log.write(f"line {number}")
    log.close()
    assert (tmp_path / "decode-0.log").stat().st_size < 70
    assert (tmp_path / "decode-0.log.1").exists()


def test_logs_are_followed_by_role_or_pod_and_through_rotation(tmp_path: Path) -> None:
    state = StateDir(tmp_path, "chat")
    state.create()
    for pod in ("decode-0", "decode-1", "router-0"):
        state.log_file(pod).write_text(f"{pod} first\n{pod} second\n")
    shown = io.StringIO()
    reader = LogReader(state, "decode", tail=1, terminal=Terminal(shown))
    reader.print_new()
    state.log_file("decode-0").replace(tmp_path / "aside")
    state.log_file("decode-0").write_text("after rotation\n")
    reader.print_new()
    assert shown.getvalue().splitlines() == [
        "decode-0      | decode-0 second",
        "decode-1      | decode-1 second",
        "decode-0      | after rotation",
    ]
    assert LogReader(state, "prefill", tail=None).files() == []


def test_a_reader_that_goes_away_does_not_end_the_service() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        terminal = Terminal(stream)
        terminal.log("decode-0", "nobody reads this")
        terminal.say("nor this")


# --- what is printed --------------------------------------------------------------------------


def test_tables_align() -> None:
    assert table(("A", "LONG"), [("xyz", "1"), ("b", "2")]) == "A     LONG\nxyz   1\nb     2"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200000, "2d")]
)
def test_ages(seconds: int, text: str) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert age_text(now - timedelta(seconds=seconds), now) == text


def test_the_example_request_is_a_shell_command_with_valid_json(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    command = example_request("http://h:1", "m", key).replace("curl", "printf '%s\\n'", 1)
    words = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "Authorization: Bearer secret" in words
    assert '"model": "m"' in words[-1]


# --- the command line -------------------------------------------------------------------------


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["up"], ["scale"], ["logs"]):
        with pytest.raises(SystemExit) as done:
            cli.main([*command, "--help"])
        assert done.value.code == 0
        assert "example" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--port", "0"], ["scale", "router=2"], ["scale", "decode"], ["scale", "deco=1"],
        ["up", "--secret", "x"], ["down", "--grace", "-1"], ["nonsense"], [],
        ["up", "--program", "penstock-worker=[1]"],
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_refused_manifest_ends_with_2_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("kind: Pod\n")
    assert cli.main(["up", "-f", str(file), "--state-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"penstock: {file} is refused:")
    assert "Traceback" not in err


def test_a_model_directory_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(
        "apiVersion: penstock.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\n"
        f"spec: {{model: {{uri: 'file://{tmp_path}'}}}}\n"
    )
    assert cli.main(["up", "-f", str(file), "--state-dir", str(tmp_path / "s")]) == 2
    assert "is no model directory: config.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_demo_renders_with_two_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render"]) == 0
    out = capsys.readouterr().out
    assert "name: penstock-demo-prefill-0" in out
    assert "kind: Secret\n" not in out
    assert cli.main(["render", "--with-keys"]) == 0
    assert "curve.secret" in capsys.readouterr().out
