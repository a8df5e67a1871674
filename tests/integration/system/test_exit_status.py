"""How a worker ends that cannot start: a status that tells a mistake from a crash, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from penstock_wire.keys import Keys
from tests.integration.local.conftest import free_port
from tests.integration.system import checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    Keys.generate().save(folder)
    return folder


def run(keys: Path, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Start a prefill stage on free ports, and wait for its end."""
    program = "from penstock_runtime.worker.main import main; main()"
    given = {
        "--role": "prefill",
        "--name": "stage",
        "--group": "group",
        "--model": f"file://{model}",
        "--bind": f"127.0.0.1:{free_port()}",
        "--http": f"127.0.0.1:{free_port()}",
        "--keys": str(keys),
    }
    flags = [part for flag in given.items() for part in flag]
    return subprocess.run(
        [sys.executable, "-c", program, *flags, *more],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_that_is_not_there(keys: Path, tmp_path: Path) -> None:
    ended = run(keys, tmp_path / "nowhere")
    assert ended.returncode == os.EX_NOINPUT
    assert ended.stderr.splitlines()[-1] == (
        f"penstock-worker: the model directory {tmp_path / 'nowhere'} is not there; give the "
        "directory that holds config.json"
    )


def test_a_model_without_weights(keys: Path, tmp_path: Path) -> None:
    model = checkpoint.make(tmp_path / "model")
    (model / "model.safetensors").unlink()
    ended = run(keys, model)
    assert ended.returncode == os.EX_NOINPUT
    assert "safetensors" in ended.stderr.splitlines()[-1]


def test_a_flag_that_is_refused(keys: Path, tmp_path: Path) -> None:
    ended = run(keys, tmp_path, "--threads", "none")
    assert ended.returncode == os.EX_CONFIG
    assert ended.stderr.splitlines()[-1] == (
        "penstock-worker: argument --threads: 'none' is not a number of 1 or more"
    )


def test_a_model_that_cannot_be_divided_so(keys: Path, tmp_path: Path) -> None:
    model = checkpoint.make(tmp_path / "model")
    ended = run(keys, model, "--stages", "5", "--stage", "1", "--peers", "group-{i}:7000")
    assert ended.returncode == os.EX_CONFIG
    assert ended.stderr.splitlines()[-1] == (
        "penstock-worker: 5 stages cannot share 4 layers: lower prefill.pipelineParallel"
    )


def test_more_kv_memory_than_there_is(keys: Path, tmp_path: Path) -> None:
    model = checkpoint.make(tmp_path / "model")
    ended = run(keys, model, "--kv-memory", str(2**53))
    assert ended.returncode == os.EX_CONFIG
    assert ended.stderr.splitlines()[-1] == (
        f"penstock-worker: --kv-memory {2**53}: this machine has not enough memory; lower it "
        "(kvCache.memory in the manifest)"
    )
