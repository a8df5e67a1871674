"""One stage of a prefill group whose arithmetic is emulated: the process side of `chunk_plans.py`.

A real `PrefillWorker`: control server, leader and scheduler on stage 0, step loop, activation ring
and KV links over NIXL. Only what runs on the compute thread is not a model: it takes as long as
given hardware would, and gives zeros. Orders and answers are JSON lines on standard input and
output; the process ends with its input.

Memory is as small as it can be: `HIDDEN` numbers a token between stages and `HEAD` a token, plane
and stage of KV, so that copies and loopback traffic take next to nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from penstock_runtime.engine.compute import Compute, leave_cores_to_compute
from penstock_runtime.engine.kv_writer import KvWriter, StageIdentity
from penstock_runtime.engine.ring import ActivationRing
from penstock_runtime.kvcache.base import KVLayout
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Chunk, Cost
from penstock_runtime.simulator.hardware import StageModel
from penstock_runtime.transfer.base import Region
from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.transfer.page_ranges import KvArena
from penstock_runtime.worker.build import RING_SLOTS
from penstock_runtime.worker.http import Health
from penstock_runtime.worker.other_ranks import NoOtherRanks
from penstock_runtime.worker.prefill import PrefillWorker
from penstock_wire.keys import Keys
from penstock_wire.messages import Hello
from penstock_wire.names import Resolver, new_boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment
    from penstock_runtime.transfer.base import Transfer

GROUP = "emulated"
PAGE = 64
"""Tokens."""
HIDDEN = 8
HEAD = 4
DTYPE = torch.float32
_SPIN_SECONDS = 1e-4
"""A sleep ends up to so much late; the rest is waited for on the core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a stage is told when it starts."""

    stage: int
    addresses: tuple[str, ...]
    """Control addresses of all stages, in order."""
    keys: str
    """Directory."""
    pages: int
    """Of the KV pool."""
    chunks: ChunkSettings
    """`max_tokens` is the size of a slot of the ring."""
    cost: Cost
    saturation: float
    """With `cost`, how long this stage's steps take: see `StageModel`."""
    jitter: float
    """Standard deviation of the logarithm of a step's time."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Asks a stage how it is, which it answers."""

    chunks: ChunkSettings | None = None
    """How stage 0 cuts prompts from now on; None: as before. `max_tokens` stays."""


class EmulatedRunner:
    """Takes the place of a stage's layers: waits as long as they would take.

    Args:
        model: how long a step takes.
        page_size: tokens.
        jitter: standard deviation of the logarithm of a step's time.
        seed: of the jitter.
    """

    def __init__(self, model: StageModel, *, page_size: int, jitter: float, seed: int) -> None:
        self.page_size = page_size
        self._model = model
        self._jitter = jitter
        self._random = random.Random(seed)
        self.late_seconds = 0.0
        """By which steps took longer than they were to, in all: the machine had no core free."""

    def seconds(self, segments: Sequence[Segment]) -> float:
        """Draw how long a step takes."""
        seconds = self._model.seconds([Chunk(s.start, s.length) for s in segments])
        return seconds * math.exp(self._random.gauss(0.0, self._jitter))

    def run(self, hidden_or_tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Return zeros, (tokens, HIDDEN), as late after the call as layers would."""
        deadline = time.perf_counter() + self.seconds(segments)
        hidden = torch.zeros(len(hidden_or_tokens), HIDDEN, dtype=DTYPE)
        self.late_seconds += wait_until(deadline)
        return hidden


def wait_until(deadline: float) -> float:
    """Return at `deadline`, on the clock of `time.perf_counter`; how late it is, in seconds."""
    while (left := deadline - time.perf_counter()) > 0:
        if left > _SPIN_SECONDS:
            time.sleep(left - _SPIN_SECONDS)
    return -left


def kv_layout(first: int, last: int) -> KVLayout:
    """Return the layout of stages [first, last), each of which holds one layer."""
    return KVLayout(
        first_layer=first,
        last_layer=last,
        planes=2,
        kv_heads=1,
        page_size=PAGE,
        head_dim=HEAD,
        itemsize=DTYPE.itemsize,
    )


def kv_arena(layout: KVLayout, pages: int) -> KvArena:
    """Take memory for KV pages."""
    pool = PoolTensor(layout, pages, dtype=DTYPE, device=torch.device("cpu"))
    return KvArena(Region(pool.address, pool.nbytes), (0, layout.kv_heads), pool)


def loopback() -> NixlTransfer:
    """Return the data path as on a network of TCP, within this host."""
    return NixlTransfer(NixlSettings(devices="lo"))


def stage_hello(stage: int, stages: int, pages: int) -> Hello:
    """Return who a stage is."""
    return Hello(
        role="prefill",
        name=f"{GROUP}-{stage}",
        boot_id=new_boot_id(),
        group=GROUP,
        stage=stage,
        stages=stages,
        model_digest=GROUP,
        kv_layout=kv_layout(0, 1).digest(GROUP, str(DTYPE)),
        layers=(stage, stage + 1),
        pages=pages,
        page_size=PAGE,
        max_model_len=pages * PAGE,
    )


def receiver_hello(stages: int, pages: int) -> Hello:
    """Return who the decode side of a group of `stages` is."""
    return Hello(
        role="decode",
        name="receiver",
        boot_id=new_boot_id(),
        model_digest=GROUP,
        kv_layout=kv_layout(0, 1).digest(GROUP, str(DTYPE)),
        layers=(0, stages),
        pages=pages,
        page_size=PAGE,
        max_model_len=pages * PAGE,
    )


def stage_worker(
    task: Task, runner: EmulatedRunner, planner: ChunkPlanner, compute: Compute, transfer: Transfer
) -> PrefillWorker:
    """Put a stage together as `worker.build` does, but for its layers."""
    who = stage_hello(task.stage, len(task.addresses), task.pages)
    layout = kv_layout(task.stage, task.stage + 1)
    identity = StageIdentity(name=who.name, boot_id=who.boot_id, group=GROUP, stage=who.stage)
    slots = (RING_SLOTS, task.chunks.max_tokens, HIDDEN)
    return PrefillWorker(
        hello=who,
        bind=task.addresses[task.stage],
        peers=list(task.addresses[1:]) if task.stage == 0 else [],
        keys=Keys.load(Path(task.keys)),
        resolver=Resolver(),
        health=Health(state="ready"),
        runner=runner,
        compute=compute,
        ring=ActivationRing(
            transfer,
            f"{who.name}/{who.boot_id}",
            torch.zeros(slots, dtype=DTYPE),
            torch.zeros(slots, dtype=DTYPE),
        ),
        kv=KvWriter(transfer, identity, [kv_arena(layout, task.pages)], layout),
        planner=planner,
        others=NoOtherRanks(),
    )


async def serve(task: Task) -> None:
    """Be the stage until standard input ends."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_end)
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    model = StageModel(task.cost, task.saturation)
    runner = EmulatedRunner(model, page_size=PAGE, jitter=task.jitter, seed=task.seed + task.stage)
    planner = ChunkPlanner(len(task.addresses), PAGE, task.chunks)
    leave_cores_to_compute()
    compute, transfer = Compute(1), loopback()
    worker = stage_worker(task, runner, planner, compute, transfer)
    await worker.start()
    try:
        while line := await orders.readline():
            order = msgspec.json.decode(line, type=Order)
            planner.settings = order.chunks or planner.settings
            state = dict(worker.describe()) | {"late_seconds": runner.late_seconds}
            print(msgspec.json.encode(state).decode(), flush=True)
    finally:
        await worker.close()
        await transfer.close()
        compute.close()


def _end(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End a stage of which a part failed: it would only look alive."""
    loop.default_exception_handler(context)
    raise SystemExit(1)


def main() -> None:
    """Run the stage that the one argument describes, in JSON."""
    logging.basicConfig(level=logging.INFO)
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=Task)))


if __name__ == "__main__":
    main()
