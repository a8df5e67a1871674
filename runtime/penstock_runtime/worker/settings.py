"""The settings of `penstock-worker`: one typed field each, with unit, default and why.

The command line is made from the fields. A flag given twice counts as given last, so that the local
cluster can append what differs on one machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from penstock_runtime.errors import ConfigurationError
from penstock_runtime.scheduler.layer_split import layer_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True, slots=True)
class KvMemory:
    """Memory for KV pages: an amount, or a share of the device memory that the weights leave."""

    amount: int = 0
    """Bytes; 0: take the share."""
    share: float = 0.0
    """Above 0, at most 1."""

    def of(self, free: Callable[[], int]) -> int:
        """Return the bytes; `free` is asked for what is left of the device if need be."""
        return self.amount or int(self.share * free())

    def __str__(self) -> str:
        return str(self.amount) if self.amount else f"{self.share:.0%}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What one worker process is told."""

    role: Literal["prefill", "decode"]
    name: str
    model: str
    bind: str
    http: str
    keys: Path
    revision: str
    device: Literal["cpu", "cuda"]
    dtype: str
    kernels: Literal["auto", "native", "torch"]
    kv_memory: KvMemory
    page_size: int
    max_model_len: int
    threads: int
    tensor_parallel: int
    hosts_file: Path | None
    model_cache: Path | None
    model_token_file: Path | None
    hub_endpoint: str | None
    net_device: str
    rdma: bool
    group: str
    stage: int
    stages: int
    layers_per_stage: tuple[float, ...]
    peers: str
    chunk_mode: Literal["adaptive", "fixed"]
    max_chunk_tokens: int
    max_batch: int
    local_prefill_tokens: int
    group_wait_seconds: float
    drain_seconds: float

    def peer(self, stage: int) -> str:
        """Return the control address of another stage of this group."""
        return self.peers.replace("{i}", str(stage))


class _Parser(argparse.ArgumentParser):
    """Ends with EX_CONFIG for what it refuses, so that it does not look like a crash."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_CONFIG, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = _Parser(
        prog="penstock-worker",
        description="One worker of a Penstock service: a stage of a prefill pipeline, or a decode "
        "worker. Started by the operator or by `penstock up`, seldom by hand.",
        allow_abbrev=False,
    )
    a = p.add_argument
    a("--role", required=True, choices=["prefill", "decode"])
    a("--name", required=True, help="name of this process, unique in the service (the pod's name)")
    a("--model", required=True, help="file:///directory or hf://organisation/name[@revision]")
    a("--bind", required=True, help="host:port of the control server")
    a("--http", required=True, help="host:port of health, state and metrics")
    a("--keys", required=True, type=Path, help="directory with the service's CURVE key pair")
    a("--revision", default="", help="revision of the service that this process belongs to")
    a("--device", default="cpu", choices=["cpu", "cuda"])
    a(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of weights, activations and KV; auto: as the checkpoint says (default: auto)",
    )
    a(
        "--kernels",
        default="auto",
        choices=["auto", "native", "torch"],
        help="native: the C++ kernels for the CPU, or refuse to start; torch: without them; auto: "
        "them if they were built for this processor, else torch, and say so (default: auto)",
    )
    a(
        "--kv-memory",
        type=_kv_memory,
        help="memory for KV pages, for example 4Gi, or on CUDA a share of the device memory that "
        "the weights leave, for example 80%%, the rest being for activations; taken whole at "
        "start, so that a full cache is never a surprise (default: 1Gi, on CUDA 90%%)",
    )
    a(
        "--page-size",
        type=_positive,
        default=32,
        help="tokens a KV page: 32 is where attention over pages and the share of a page that a "
        "prompt wastes are both near their best (default: 32)",
    )
    a(
        "--max-model-len",
        type=int,
        default=0,
        help="longest sequence in tokens; 0: as the model's configuration says (default: 0)",
    )
    a("--threads", type=_positive, default=1, help="compute threads (default: 1)")
    a(
        "--tensor-parallel",
        type=_positive,
        default=1,
        help="ranks that share every layer: this process and child processes, each on a device of "
        "its own, or with its part of --threads; --kv-memory is for all of them (default: 1)",
    )
    a("--hosts-file", type=Path, help="JSON object of host names and addresses, instead of DNS")
    a("--model-cache", type=Path, help="folder for downloaded models (default: the hub's own)")
    a("--model-token-file", type=Path, help="file with the hub's access token")
    a("--hub-endpoint", help="address of the hub, for a mirror (default: the hub's own)")
    a(
        "--net-device",
        default="",
        help="network device for KV and activations, for example eth0 (default: all)",
    )
    a(
        "--rdma",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="move KV and activations by RDMA where a device is there; without one, over TCP, and "
        "say so (default: no)",
    )
    a("--group", default="", help="prefill group")
    a("--stage", type=int, default=0, help="this stage, from 0")
    a("--stages", type=_positive, default=1, help="stages in the group")
    a(
        "--layers-per-stage",
        type=layer_counts,
        default=(),
        help="layers of each stage, for example 9,9,8; 8.5,7.5 cuts a layer behind its attention "
        "(default: the same arithmetic for all)",
    )
    a("--peers", default="", help="control address of stage {i} of the group")
    a(
        "--chunk-mode",
        default="adaptive",
        choices=["adaptive", "fixed"],
        help="adaptive: chunks of equal predicted time; fixed: of --max-chunk-tokens "
        "(default: adaptive)",
    )
    a(
        "--max-chunk-tokens",
        type=_positive,
        default=512,
        help="most tokens in one step: bounds the memory for activations and, on a decode worker, "
        "how long a prompt can hold up the others (default: 512)",
    )
    a("--max-batch", type=_positive, default=64, help="most requests in one step (default: 64)")
    a(
        "--local-prefill-tokens",
        type=int,
        default=64,
        help="a decode worker prefills remainders up to this many tokens itself: sending them "
        "away would cost more than computing them (default: 64)",
    )
    a(
        "--group-wait-seconds",
        type=float,
        default=10.0,
        help="a decode worker whose prefill group went away waits this long for it before it "
        "prefills by itself: about a stage's restart (default: 10)",
    )
    a(
        "--drain-seconds",
        type=float,
        default=30.0,
        help="after SIGTERM, wait this long for running requests (default: 30)",
    )
    return p


def parse(arguments: Sequence[str] | None = None) -> WorkerSettings:
    """Return the settings of a command line. Raises ConfigurationError on values that conflict."""
    values = vars(parser().parse_args(arguments))
    on_cuda = values["device"] == "cuda"
    if values["kv_memory"] is None:
        values["kv_memory"] = KvMemory(share=0.9) if on_cuda else KvMemory(amount=2**30)
    settings = WorkerSettings(**values)
    if settings.kv_memory.share and not on_cuda:
        raise ConfigurationError(
            f"--kv-memory {settings.kv_memory} is a share of a GPU's memory: with --device cpu "
            "name an amount, for example 4Gi"
        )
    if settings.role == "prefill":
        if not 0 <= settings.stage < settings.stages:
            raise ConfigurationError(
                f"--stage {settings.stage} is not in a group of {settings.stages} stages "
                f"(0 … {settings.stages - 1})"
            )
        if settings.layers_per_stage and len(settings.layers_per_stage) != settings.stages:
            raise ConfigurationError(
                f"--layers-per-stage has {len(settings.layers_per_stage)} numbers for "
                f"{settings.stages} stages: give one each"
            )
        if not settings.group:
            raise ConfigurationError("a prefill stage needs --group, the name of its group")
        if settings.stages > 1 and "{i}" not in settings.peers:
            raise ConfigurationError(
                "a group of several stages needs --peers with {i} where the stage's number "
                "stands, for example chat-prefill-0-{i}.chat-workers:7000"
            )
    return settings


def _kv_memory(text: str) -> KvMemory:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]|[KMG]i|%)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no amount of memory, write for example 2Gi or, on CUDA, 80%"
        )
    value, unit = float(match[1]), match[2] or ""
    if unit != "%":
        return KvMemory(amount=int(value * _UNITS[unit]))
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0% and up to 100%")
    return KvMemory(share=value / 100)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
