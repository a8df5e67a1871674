"""Adaptive chunk plans against fixed chunk sizes: the real engine, with emulated arithmetic.

Every stage is a process with a real prefill worker: leader, scheduler, a planner that learns its
cost model from the steps it sees, step loop, activation rings and KV links (NIXL over loopback
TCP), control links. This process is the decode side: a real group link, a ledger and an arena,
into which all stages write their KV. Only the layers are emulated: a step occupies its stage's
compute thread for as long as the modelled hardware would, within a jitter.

  hardware    t = c + gamma L + b hypot(x, saturation) + a (2 L x + x²) for x tokens behind L; the
              planner does not know of the saturation. By default a stage of the published system
              that `simulate_published.py` fits, in real time. `--cost` names another one.
  TTFT        from the prompt's way into stage 0 until the KV of all its tokens, of all stages, is
              announced here. The one decode step that follows is not part of it.
  best fixed  of the sizes given, the one with the least median
  ratio       TTFT of the best fixed size by that of the adaptive plan, in the same round
  chunks      steps of the prompt
  bubble      share of the TTFT in which a stage did not compute, mean of the stages
  late        by which a step took longer than emulated, mean of all: a core was not free at once
  simulated   TTFT by the simulator: the same scheduler, also learning, on the same hardware
  bound       of the ratio, by the closed form with the coefficients that the planner had learned:
              1 + 2 (√r - 1) s / (1 + s)², s² = (P - 1) c / W, r = (b + 2 a S) / (b + a S)
              for a prompt of S tokens, work W a stage, P stages; c with reading the prefix. Chunks
              of equal tokens differ in time by r, the last to the mean; that is all a plan can
              gain against the best of them. It is at most (1 + √r) / 2, for s = 1.

One group serves all modes in turn; stage 0 is told how to cut the next prompt. So the planner also
learns from the steps of fixed sizes. A second group would disturb more than that does: idle stages
poll their transfers too. Activations and KV are a few bytes a token: what is measured is
scheduling, hand-overs and messages, not copies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from common import (
    RESULTS,
    Report,
    Spread,
    busy_seconds,
    end_on_sigterm,
    free_port,
    last_lines,
    say,
    table,
)
from emulated_stage import GROUP, PAGE, Order, Task, kv_arena, kv_layout, loopback, receiver_hello

from penstock_runtime.engine.group_link import GroupLink, incarnations
from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, ChunkSettings
from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.scheduler.prefill import PrefillScheduler
from penstock_runtime.simulator import costs
from penstock_runtime.simulator.calibration import calibrate
from penstock_runtime.simulator.group import unlike_tokens
from penstock_runtime.simulator.hardware import Hardware
from penstock_runtime.simulator.published import DEEPSEEK, QWEN
from penstock_runtime.simulator.replay import replay
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_wire.keys import Keys
from penstock_wire.messages import GroupAddress
from penstock_wire.names import Resolver

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Sequence

    from penstock_runtime.simulator.hardware import StageModel
    from penstock_runtime.transfer.base import Transfer
    from penstock_runtime.transfer.ownership import Revocation

PUBLISHED = {"qwen": QWEN, "deepseek": DEEPSEEK}
ADAPTIVE = "adaptive"
PROGRAM = Path(__file__).with_name("emulated_stage.py")
NUMBERS = itertools.count(1)
"""Of prompts: no two have a block in common."""
_START_SECONDS = 180.0
"""Of all processes of a group together: on few cores their imports take turns."""
_READY_SECONDS = 60.0
_PROMPT_SECONDS = 300.0
_ANSWER_SECONDS = 30.0
_END_SECONDS = 15.0
_LEARNING_PROMPTS = 4
"""In the simulation, before the one that counts."""


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise SystemExit that names what was waited for if the body takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise SystemExit(f"waited {seconds:g} s for {what}") from None


# --- a group ----------------------------------------------------------------------------------


class StageProcess:
    """A process of `emulated_stage.py`."""

    def __init__(self, process: asyncio.subprocess.Process, stage: int, log: Path) -> None:
        self._process = process
        self._stage = stage
        self._log = log

    @classmethod
    async def start(cls, task: Task, log: Path) -> StageProcess:
        """Start it; its log goes to a file."""
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(PROGRAM),
                msgspec.json.encode(task).decode(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
            )
        return cls(process, task.stage, log)

    async def ask(self, order: Order, patience: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """Give an order; return the stage's state behind it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with within(patience, f"the state of stage {self._stage}"):
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(msgspec.json.encode(order) + b"\n")
                await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit(f"stage {self._stage} has ended:\n{last_lines(self._log)}")
        state: dict[str, Any] = msgspec.json.decode(line)
        return state

    async def end(self) -> None:
        """End it; kill it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            say(f"stage {self._stage} did not end in {_END_SECONDS:g} s and is killed")
            self._process.kill()
            await self._process.wait()


class Receiver:
    """The decode side of one group: grants out, KV in. One prompt at a time.

    Args:
        addresses: of the stages.
        keys: of the service.
        pages: of the pool.
        transfer: the data path.
    """

    def __init__(
        self, addresses: Sequence[str], keys: Keys, pages: int, transfer: Transfer
    ) -> None:
        stages = len(addresses)
        self._hello = receiver_hello(stages, pages)
        self._pool = PagePool(pages, PAGE)
        self._changed = asyncio.Event()
        self._complete: asyncio.Future[float] | None = None
        self._link = GroupLink(
            GroupAddress(name=GROUP, stages=tuple(addresses)),
            hello=self._hello,
            keys=keys,
            resolver=Resolver(),
            transfer=transfer,
            arenas=[kv_arena(kv_layout(0, stages), pages)],
            ledger=GrantLedger(self._pool),
            incarnations=incarnations(),
            owner=self,
        )

    async def open(self) -> None:
        """Return when every stage has verified its link."""
        self._link.start()
        async with within(_READY_SECONDS, "the links to all stages"):
            while not self._link.ready:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        """End the links."""
        await self._link.close()

    async def prefill(self, tokens: array[int]) -> float:
        """Return the seconds from sending a prompt until all its KV is here."""
        pages = self._pool.allocate(pages_for(len(tokens), PAGE))
        self._complete = asyncio.get_running_loop().create_future()
        async with within(_PROMPT_SECONDS, f"the KV of {len(tokens)} tokens"):
            started = time.perf_counter()
            self._link.prefill("prompt", tokens, 0, pages, b"")
            ended = await self._complete
        self._pool.release(pages)
        return ended - started

    # --- what the link tells ---

    def prefill_complete(self, grant: int, reused: int) -> None:  # noqa: ARG002
        """All KV is here."""
        if self._complete is not None and not self._complete.done():
            self._complete.set_result(time.perf_counter())

    def prefill_cut(self, cut: Revocation, reason: str) -> None:
        """A prompt was cut short, which is no result."""
        if self._complete is not None and not self._complete.done():
            self._complete.set_exception(SystemExit(f"grant {cut.grant} was cut: {reason}"))

    def group_changed(self) -> None:
        """The group may have become ready."""
        self._changed.set()


class Group:
    """A group of stage processes, and its receiver."""

    def __init__(self, stages: Sequence[StageProcess], receiver: Receiver) -> None:
        self._stages = stages
        self._receiver = receiver

    async def states(self, chunks: ChunkSettings | None = None) -> list[dict[str, Any]]:
        """Return the state of every stage; `chunks` is how stage 0 cuts prompts from now on."""
        return [
            await stage.ask(Order(chunks=chunks if number == 0 else None))
            for number, stage in enumerate(self._stages)
        ]

    async def sample(self, tokens: int, chunks: ChunkSettings | None = None) -> dict[str, Any]:
        """Send one prompt through the idle group and return what it took."""
        before = await self.states(chunks)
        cores = busy_seconds()
        seconds = await self._receiver.prefill(unlike_tokens(next(NUMBERS), tokens))
        cores = (busy_seconds() - cores) / seconds
        after = await self._settled()
        steps = after[0]["steps"] - before[0]["steps"]
        late = sum(a["late_seconds"] for a in after) - sum(b["late_seconds"] for b in before)
        busy = [
            b["compute_seconds"] - a["compute_seconds"] for a, b in zip(before, after, strict=True)
        ]
        return {
            "tokens": tokens,
            "ttft": seconds,
            "chunks": steps,
            "bubble": 1 - sum(busy) / len(busy) / seconds,
            "late_ms": late / steps / len(after) * 1e3,
            "compute_seconds": busy,
            "machine_cores": cores,
            "costs": after[0]["costs"],
        }

    async def _settled(self) -> list[dict[str, Any]]:
        """Return the states when every stage has released the last prompt."""
        async with within(_ANSWER_SECONDS, "every stage to be idle"):
            while True:
                states = await self.states()
                if not any(state["busy"] for state in states):
                    return states
                await asyncio.sleep(0.05)


@asynccontextmanager
async def running(
    model: StageModel, stages: int, chunks: ChunkSettings, args: argparse.Namespace
) -> AsyncIterator[Group]:
    """Run a group while the context lasts."""
    addresses = tuple(f"127.0.0.1:{free_port()}" for _ in range(stages))
    pages = 2 * pages_for(max(*args.prompt_tokens, *args.warm_up), PAGE)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        keys = Keys.generate()
        keys.save(folder / "keys")
        transfer = loopback()
        stack.push_async_callback(transfer.close)
        processes = []
        for stage in range(stages):
            task = Task(
                stage=stage,
                addresses=addresses,
                keys=str(folder / "keys"),
                pages=pages,
                chunks=chunks,
                cost=model.cost,
                saturation=model.saturation,
                jitter=args.jitter,
                seed=args.seed,
            )
            processes.append(await StageProcess.start(task, folder / f"stage-{stage}.log"))
            stack.push_async_callback(processes[-1].end)
        group = Group(processes, receiver := Receiver(addresses, keys, pages, transfer))
        for process in processes:
            await process.ask(Order(), _START_SECONDS)
        stack.push_async_callback(receiver.close)
        await receiver.open()
        yield group


# --- measuring --------------------------------------------------------------------------------


def modes(args: argparse.Namespace) -> dict[str, ChunkSettings]:
    """Return the ways to cut prompts, by name. All have the same largest step."""
    most = max(args.fixed)
    fixed = {
        f"fixed {size:,}": ChunkSettings(mode="fixed", fixed_tokens=size, max_tokens=most)
        for size in args.fixed
    }
    return {ADAPTIVE: ChunkSettings(max_tokens=most), **fixed}


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Return the names in another order in every round, so that none is always first."""
    start = by % len(names)
    return [*names[start:], *names[:start]]


async def measure_stages(
    stages: int, model: StageModel, args: argparse.Namespace
) -> AsyncIterator[dict[str, Any]]:
    """Yield the samples of one number of stages: rounds over all modes."""
    ways = modes(args)
    async with running(model, stages, ways[ADAPTIVE], args) as group:
        # Not counted: first uses of code and memory, and what the planner learns from.
        for tokens in args.warm_up:
            await group.sample(tokens, ways[ADAPTIVE])
        for number in range(args.rounds):
            for tokens in args.prompt_tokens:
                for name in rotated(list(ways), number):
                    found = await group.sample(tokens, ways[name])
                    say(
                        f"{stages} stages, {tokens} tokens, {name}: TTFT {found['ttft']:.3f} s, "
                        f"{found['chunks']} chunks, late {found['late_ms']:.2f} ms"
                    )
                    yield {"stages": stages, "mode": name, "round": number, **found}


async def measure(args: argparse.Namespace, report: Report) -> list[dict[str, Any]]:
    """Return all samples."""
    samples: list[dict[str, Any]] = []
    for stages in args.stages:
        async for found in measure_stages(stages, hardware(args, stages), args):
            samples.append(found)
            report.write(samples=samples)
    return samples


def hardware(args: argparse.Namespace, stages: int) -> StageModel:
    """Return how long the steps of one of `stages` stages take."""
    if args.cost is not None:
        return costs.from_text(args.cost)
    return calibrate(PUBLISHED[args.model]).stage(stages)


# --- beside it --------------------------------------------------------------------------------


def simulated(
    model: StageModel, stages: int, tokens: int, chunks: ChunkSettings, args: argparse.Namespace
) -> float:
    """Return the TTFT by the simulator, in seconds, of a planner that has seen some prompts."""
    prompts = 1 + (_LEARNING_PROMPTS if chunks.mode == "adaptive" else 0)
    scheduler = PrefillScheduler(
        stages,
        PagePool(prompts * pages_for(tokens, PAGE), PAGE),
        ChunkPlanner(stages, PAGE, chunks),
    )
    group = Hardware.uniform(stages, model, noise=args.jitter)
    ready = replay(
        scheduler, group, [tokens] * prompts, page_size=PAGE, in_turn=True, seed=args.seed
    ).ready
    return ready[-1] - (ready[-2] if prompts > 1 else 0.0)


def bound(cost: Cost, stages: int, tokens: int) -> float:
    """Return the most that the best equal-time plan gains over the best equal-size one.

    See the head of this file. Chunks are taken to be small beside the prompt.
    """
    work = cost.work(0, tokens)
    overhead = ChunkPlanner(stages, PAGE).step_overhead(cost, tokens / 2)
    s = math.sqrt((stages - 1) * overhead / work)
    r = (cost.b + 2 * cost.a * tokens) / (cost.b + cost.a * tokens)
    return 1 + 2 * (math.sqrt(r) - 1) * s / (1 + s) ** 2


def learned(costs_of_stages: Sequence[dict[str, float]], tokens: int) -> Cost:
    """Return what the planner took for the slowest stage."""
    found = [Cost(*(entry[name] for name in ("c", "gamma", "b", "a"))) for entry in costs_of_stages]
    return max(found, key=lambda cost: cost.chunk(0, tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One mode on one set-up."""

    stages: int
    tokens: int
    mode: str
    ttft: Spread
    chunks: float
    bubble: float
    late_ms: float
    simulated: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One set-up."""

    stages: int
    tokens: int
    best_fixed: str
    ratio: Spread
    simulated_best_fixed: str
    simulated_ratio: float
    bound: float


def rows_of(samples: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[Row]:
    """Return a row for each set-up and mode."""
    rows = []
    for stages, tokens, (name, chunks) in itertools.product(
        args.stages, args.prompt_tokens, modes(args).items()
    ):
        found = chosen(samples, stages, tokens, name)
        rows.append(
            Row(
                stages=stages,
                tokens=tokens,
                mode=name,
                ttft=Spread.of(s["ttft"] for s in found),
                chunks=Spread.of(s["chunks"] for s in found).median,
                bubble=Spread.of(s["bubble"] for s in found).median,
                late_ms=Spread.of(s["late_ms"] for s in found).median,
                simulated=simulated(hardware(args, stages), stages, tokens, chunks, args),
            )
        )
    return rows


def chosen(
    samples: Sequence[dict[str, Any]], stages: int, tokens: int, mode: str
) -> list[dict[str, Any]]:
    """Return the samples of one set-up and mode, in the order of the rounds."""
    key = (stages, tokens, mode)
    return [s for s in samples if (s["stages"], s["tokens"], s["mode"]) == key]


def verdict(samples: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Verdict:
    """Compare the adaptive plan with the best fixed size of the same set-up."""
    adaptive = next(row for row in rows if row.mode == ADAPTIVE)
    fixed = [row for row in rows if row.mode != ADAPTIVE]
    best = min(fixed, key=lambda row: row.ttft.median)
    best_simulated = min(fixed, key=lambda row: row.simulated)
    ours, theirs = (chosen(samples, row.stages, row.tokens, row.mode) for row in (adaptive, best))
    cost = learned(ours[-1]["costs"], adaptive.tokens)
    return Verdict(
        stages=adaptive.stages,
        tokens=adaptive.tokens,
        best_fixed=best.mode,
        ratio=Spread.of(t["ttft"] / o["ttft"] for o, t in zip(ours, theirs, strict=True)),
        simulated_best_fixed=best_simulated.mode,
        simulated_ratio=best_simulated.simulated / adaptive.simulated,
        bound=bound(cost, adaptive.stages, adaptive.tokens),
    )


def row_table(rows: Sequence[Row]) -> str:
    """Return the table of TTFTs."""
    columns = ("stages", "prompt", "chunks of", "TTFT, s", "chunks", "bubble", "late, ms")
    return table(
        (*columns, "simulated, s"),
        [
            (
                str(row.stages),
                f"{row.tokens:,}",
                row.mode,
                row.ttft.text(3),
                f"{row.chunks:g}",
                f"{row.bubble:.1%}",
                f"{row.late_ms:.2f}",
                f"{row.simulated:.3f}",
            )
            for row in rows
        ],
    )


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of ratios."""
    columns = ("stages", "prompt", "best fixed", "best fixed / adaptive", "simulated", "bound")
    return table(
        columns,
        [
            (
                str(v.stages),
                f"{v.tokens:,}",
                v.best_fixed,
                v.ratio.text(3),
                f"{v.simulated_ratio:.3f} ({v.simulated_best_fixed})",
                f"{v.bound:.3f}",
            )
            for v in verdicts
        ],
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = p.add_argument
    a("--stages", nargs="+", type=int, default=[4, 8])
    a("--prompt-tokens", nargs="+", type=int, default=[32_768, 131_072])
    a("--fixed", nargs="+", type=int, default=[768, 1024, 1536, 2048, 4096, 8192], help="sizes")
    a("--rounds", type=int, default=3, help="of all modes, alternating (default: 3)")
    a(
        "--warm-up",
        nargs="+",
        type=int,
        default=[32_768, 131_072],
        help="prompts that the planner learns from first",
    )
    a("--model", choices=PUBLISHED, default="qwen", help="whose published stages (default: qwen)")
    a("--cost", help="of a stage instead: c=SECONDS,b=SECONDS with a=, gamma=, saturation=")
    a("--jitter", type=float, default=0.01, help="of a step's time, relative (default: 0.01)")
    a("--seed", type=int, default=1, help="of the jitter (default: 1)")
    a("--output", type=Path, default=RESULTS / "chunk_plans.json", help="results, with hardware")
    return p


def main() -> None:
    """Run the command line."""
    args = parser().parse_args()
    end_on_sigterm()
    try:
        models = {stages: asdict(hardware(args, stages)) for stages in args.stages}
    except costs.CostsUnknown as error:
        raise SystemExit(str(error)) from error
    report = Report(args.output)
    report.write(hardware_emulated=models, page_size=PAGE, jitter=args.jitter)
    samples = asyncio.run(measure(args, report))
    rows = rows_of(samples, args)
    verdicts = [
        verdict(samples, [r for r in rows if (r.stages, r.tokens) == setup])
        for setup in itertools.product(args.stages, args.prompt_tokens)
    ]
    print(row_table(rows), verdict_table(verdicts), sep="\n\n")
    report.write(rows=[asdict(r) for r in rows], verdicts=[asdict(v) for v in verdicts])


if __name__ == "__main__":
    main()
