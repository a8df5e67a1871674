"""One of a worker's other ranks: a child process that computes its part of every step.

It is told its setup and then its steps as frames on standard input, and says `loaded` on standard
output. It follows its worker in everything: signals to the process group are not its business, and
when the worker is gone, so is the rank, even from within a call that waits for other ranks.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
import torch

from penstock_runtime.engine.rank_step import RankStep
from penstock_runtime.engine.runner import FollowingRunner
from penstock_runtime.kernels.selection import KernelChoice  # noqa: TC001 - msgspec reads it
from penstock_runtime.kvcache.base import LayerRange  # noqa: TC001 - msgspec reads it
from penstock_runtime.kvcache.shared_memory import SharedHandle, open_shared
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.collective import Ranks
from penstock_runtime.model.config import DTYPES, ModelConfig
from penstock_runtime.model.transformer import Transformer
from penstock_wire.garbage import keep_what_is_there

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("penstock.rank")

_LENGTH = struct.Struct("<I")
_LAST_STEP_SECONDS = 5.0
"""What a step may still take after the worker's end."""


class RankSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must know before its first step."""

    rank: int
    size: int
    meeting: str
    """A file in a directory of the worker's own, see `collective.Ranks`."""
    address: str
    timeout: float
    """Seconds to wait for other ranks."""
    threads: int
    model: str
    layers: LayerRange
    embed: bool
    head: bool
    dtype: str
    device: str
    kernels: KernelChoice
    page_size: int


class RankPool(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told when all have loaded: then it is known what they leave of the memory."""

    pages: int
    kv: SharedHandle


def frame(message: msgspec.Struct) -> bytes:
    """Return a message as it goes to a rank."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def main() -> None:
    """Load, say so, take the pool, and follow until the worker closes the pipe."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Whatever a library prints must not be taken for a report.
    reports = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_worker, args=(sys.stdin.fileno(),), daemon=True).start()
    frames = _frames(sys.stdin.buffer)
    setup = msgspec.msgpack.decode(next(frames), type=RankSetup)
    torch.set_num_threads(setup.threads)
    with torch.inference_mode():
        model, ranks = _load(setup)
        os.write(reports, b"loaded\n")
        os.close(reports)
        told = next(frames, None)
        if told is None:
            return
        runner = FollowingRunner(
            model, _pool(setup, model, msgspec.msgpack.decode(told, type=RankPool))
        )
        ranks.connect()
        keep_what_is_there()
        decode = msgspec.msgpack.Decoder(RankStep).decode
        for encoded in frames:
            runner.follow(decode(encoded))


def _load(setup: RankSetup) -> tuple[Transformer, Ranks]:
    path, device, dtype = Path(setup.model), torch.device(setup.device), DTYPES[setup.dtype]
    ranks = Ranks(
        rank=setup.rank,
        size=setup.size,
        meeting=Path(setup.meeting),
        device=device,
        address=setup.address,
        timeout=setup.timeout,
    )
    model = Transformer.load(
        path,
        ModelConfig.from_directory(path),
        layers=setup.layers,
        embed=setup.embed,
        head=setup.head,
        dtype=dtype,
        device=device,
        kernels=setup.kernels,
        ranks=ranks,
    )
    return model, ranks


def _pool(setup: RankSetup, model: Transformer, told: RankPool) -> PoolTensor:
    layout = model.config.kv_layout(
        layers=setup.layers, page_size=setup.page_size, dtype=model.dtype
    )
    memory = open_shared(told.kv, told.pages * layout.page_bytes)
    return PoolTensor(layout, told.pages, dtype=model.dtype, device=model.device, memory=memory)


def _frames(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the frames of a stream until its end."""
    while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        body = stream.read(length)
        if len(body) < length:
            return
        yield body


def _end_with_worker(pipe: int) -> None:
    """End this process soon after the worker closed the pipe, whatever it waits for."""
    poll = select.poll()
    poll.register(pipe, 0)  # a hang-up is reported without being asked for
    poll.poll()
    time.sleep(_LAST_STEP_SECONDS)
    log.error("the worker is gone and the last step does not end")
    os._exit(1)


if __name__ == "__main__":
    main()
