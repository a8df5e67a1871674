"""Measures a whole service of ours against `vllm serve` on this machine, as their users see them.

Ours is `penstock up` with a manifest of one decode worker, which prefills for itself, and a router.
Both are asked the same over HTTP: /v1/completions with token ids, greedy, streamed, output of a
fixed length. Both have all cores, the same KV memory and at most 64 requests in a step. A prompt is
computed in chunks, which is where mixed load trades streams for prompts: by default at most 512
tokens in ours and 2,048 in vLLM; --chunk-tokens gives both the same.

Both are up at once and measured in turn: in every round each row is measured once with each, one
right behind the other when the other one is idle, and which is first changes from round to round.
The ratio is formed within such a pair. Prefix caches are on.

  prefill N   one prompt of N tokens that is new in all its parts and one output token: N / TTFT,
              where TTFT is the time from sending the request to its first token. A prompt that
              would leave no room for the token (--max-model-len) is one token shorter.
  decode B    B prompts whose KV is cached, sent at once: the sum over the streams of the tokens
              behind the first one, divided by the time from the first to the last one.
  mixed       B streams decode all the time, while prompts come one behind another: the next one is
              sent when the first token of the last one is there. The window begins when all
              streams have begun. It lasts --window seconds and until the prompt in flight then has
              its token: it holds whole prompts, or few long ones would be counted too coarsely.
                output tokens/s, prompt tokens/s   all in the window, by its length
                between tokens                     every gap of every stream that ends in it; the
                                                   median hides how long the rare long ones are
                TTFT                               of the prompts
              Then the streams are cut off.
  start       seconds from the start of the command until it is ready (/ready, /health) and until
              it has answered a request of one token. One runs at a time, in turn. The first start
              of both has nothing compiled, neither Python's bytecode nor vLLM's graphs, as
              behind a fresh installation; the later ones find what it has left. The
              checkpoint is in the page cache as it happens to be.

Requests ask for log-probabilities of no alternatives (`logprobs: 0`), since only so every token is
an event. The first tokens of both are compared behind a few prompts: in bfloat16, random weights
leave some near ties, which fall either way.

Clients are on the same machine and take a little of its time. Beside each sample stand the cores
that the server, the client, the idle server and other processes got.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    CACHE,
    RESULTS,
    Report,
    Spread,
    end_on_sigterm,
    load_average,
    percentile,
    prompts,
    say,
    table,
    wait_for_calm,
)
from completions import arrivals, ask, run_client, text
from make_model import CONFIG, ensure_model
from pairs import cores_taken, take_pair
from servers import SERVERS, Options, Server
from vllm_setup import add_options, ensure_vllm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    import httpx

    Measure = Callable[[httpx.AsyncClient, Iterator[int]], Awaitable[dict[str, Any]]]
    """Takes one sample; the numbers are seeds of prompts that nobody has seen."""

NAMES = tuple(SERVERS)
MIXED = "mixed"
CACHED = 0
"""Seed of the prompts that streams decode behind."""
SEEDS_A_PAIR = 1000
AGREEMENT_PROMPTS = 32, 64
"""How many and how long."""
WARM_UP_TOKENS, WARM_UP_SECONDS = 2048, 5.0


# --- one sample -------------------------------------------------------------------------------


async def prefill(
    args: argparse.Namespace, length: int, client: httpx.AsyncClient, seeds: Iterator[int]
) -> dict[str, Any]:
    """Measure a row of one new prompt."""
    length = min(length, args.max_model_len - 1)
    answer = await ask(client, prompts(next(seeds), 1, length)[0], 1)
    return {"rate": length / answer.ttft, "latency": answer.ttft}


async def decode(
    args: argparse.Namespace, batch: int, client: httpx.AsyncClient, _: Iterator[int]
) -> dict[str, Any]:
    """Measure a row of several streams."""
    started = prompts(CACHED, batch, args.context)
    await asyncio.gather(*(ask(client, prompt, 1) for prompt in started))
    answers = await asyncio.gather(*(ask(client, prompt, args.output) for prompt in started))
    return {
        "rate": sum(1 / answer.itl for answer in answers),
        "latency": Spread.of(answer.itl for answer in answers).median,
        "ttft": [answer.ttft for answer in answers],
    }


class Stream:
    """One that decodes as long as it is let, and when its tokens came."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.begun = asyncio.Event()

    async def run(self, client: httpx.AsyncClient, prompt: list[int], count: int) -> None:
        """Ask for it."""
        async for moment in arrivals(client, prompt, count):
            self.moments.append(moment)
            self.begun.set()


async def mixed(
    args: argparse.Namespace, client: httpx.AsyncClient, seeds: Iterator[int]
) -> dict[str, Any]:
    """Measure decoding beside prompts."""
    streams = [Stream() for _ in range(args.streams)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(stream.run(client, prompt, args.max_model_len - args.context))
            for stream, prompt in zip(
                streams, prompts(CACHED, args.streams, args.context), strict=True
            )
        ]
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        begin = end = time.perf_counter()
        ttft: list[float] = []
        while end < begin + args.window:
            prompt = prompts(next(seeds), 1, args.mixed_prompt)[0]
            ttft.append((await ask(client, prompt, 1)).ttft)
            end = time.perf_counter()
        if any(task.done() for task in tasks):
            raise SystemExit("a stream has ended within the window: raise --max-model-len")
        for task in tasks:
            task.cancel()
    gaps = [
        after - before
        for stream in streams
        for before, after in itertools.pairwise(stream.moments)
        if begin < after <= end
    ]
    return {
        "output_rate": len(gaps) / (end - begin),
        "prompt_rate": len(ttft) * args.mixed_prompt / (end - begin),
        "gap_p50": percentile(gaps, 50),
        "gap_p99": percentile(gaps, 99),
        "gap_max": max(gaps),
        "ttft_median": Spread.of(ttft).median,
        "ttft": ttft,
        "seconds": end - begin,
    }


def sample(
    args: argparse.Namespace, row: str, measure: Measure, first_seed: int, server: Server
) -> dict[str, Any]:
    """Take one sample of a row with a server."""
    seeds = itertools.count(first_seed)
    what = f"{row} of {server.name} ({server.log})"
    return run_client(server.url, args.timeout, what, lambda client: measure(client, seeds))


# --- the run ----------------------------------------------------------------------------------


def rows(args: argparse.Namespace) -> dict[str, Measure]:
    """Return what a round measures."""
    found: dict[str, Measure] = {f"prefill {n:,}": partial(prefill, args, n) for n in args.prefill}
    found |= {f"decode {n}": partial(decode, args, n) for n in args.decode}
    if args.window > 0:
        found[MIXED] = partial(mixed, args)
    return found


def lighter(args: argparse.Namespace) -> argparse.Namespace:
    """Return what the warm-up measures: work of the same kinds, but less of it."""
    less = {
        "prefill": sorted({min(n, WARM_UP_TOKENS) for n in args.prefill}),
        "window": min(args.window, WARM_UP_SECONDS),
    }
    return argparse.Namespace(**vars(args) | less)


def order(number: int) -> Sequence[str]:
    """Return who is measured first in a round."""
    return NAMES[::-1] if number % 2 else NAMES


def measure_starts(args: argparse.Namespace, options: Options, report: Report) -> None:
    """Start each server several times, one at a time."""
    starts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="compiled-", dir=CACHE) as compiled:
        for number in range(args.starts):
            pair = {}
            for name in order(number):
                wait_for_calm(args.wait_for_calm)
                say(f"start {number + 1}/{args.starts} of {name}")
                with SERVERS[name](options, Path(compiled)) as server:
                    pair[name] = {"ready": server.ready_seconds, "answer": server.answer_seconds}
            starts.append(pair)
            report.write(starts=starts)


def measure_rows(args: argparse.Namespace, options: Options, report: Report) -> None:
    """Measure all rows with both servers, in rounds behind a warm-up."""
    samples: list[dict[str, Any]] = []
    # Prompts of a prefill are new in every pair, and the same for both.
    first_seeds = itertools.count(CACHED + SEEDS_A_PAIR, SEEDS_A_PAIR)
    with ExitStack() as stack:
        servers = {}
        for name in NAMES:
            say(f"starting {name}")
            servers[name] = stack.enter_context(SERVERS[name](options, CACHE / "compiled"))
        report.write(agreement=agreement(args, list(servers.values())))
        for number in range(-1, args.rounds):
            counted = number >= 0
            for row, measure in rows(args if counted else lighter(args)).items():
                wait_for_calm(args.wait_for_calm)
                take = partial(sample, args, row, measure, next(first_seeds))
                pair = take_pair(servers, order(number), take)
                name = f"round {number + 1}/{args.rounds}" if counted else "warm-up"
                say(f"{name}, {row}: {told(row, pair)}")
                if counted:
                    samples.append({"row": row, "round": number, **pair})
                    report.write(samples=samples)


def agreement(args: argparse.Namespace, servers: list[Server]) -> str:
    """Tell how often all chose the same first token: do they serve the same model at all?"""

    async def first_tokens(client: httpx.AsyncClient) -> list[str]:
        return [await text(client, prompt, 1) for prompt in prompts(CACHED, *AGREEMENT_PROMPTS)]

    chosen = [
        run_client(server.url, args.timeout, f"short answers of {server.name}", first_tokens)
        for server in servers
    ]
    same = sum(len(set(texts)) == 1 for texts in zip(*chosen, strict=True))
    return f"the first token was the same behind {same} of {len(chosen[0])} prompts"


def told(row: str, pair: dict[str, dict[str, Any]]) -> str:
    """Return a line about one pair."""
    keys = ("output_rate", "prompt_rate") if row == MIXED else ("rate",)
    rates = " and ".join(
        f"{pair['penstock'][key]:,.1f} against {pair['vllm'][key]:,.1f} tokens/s" for key in keys
    )
    return f"{rates}; {cores_taken(pair.values())}"


def compare(args: argparse.Namespace) -> None:
    """Run the benchmark."""
    options = Options(
        model=ensure_model(args.model),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        kv_gib=args.kv_gib,
        chunk_tokens=args.chunk_tokens,
        vllm_python=ensure_vllm(args.vllm_python),
        kernels=args.kernels,
        wait_policy=args.wait_policy,
    )
    report = Report(args.out)
    measure_starts(args, options, report)
    if args.rounds > 0 and rows(args):
        measure_rows(args, options, report)
    samples: list[dict[str, Any]] = report.content.get("samples", [])
    starts: list[dict[str, Any]] = report.content.get("starts", [])
    print(f"\n{args.dtype}; median (minimum to maximum)\n")
    for shown in (row_table(samples), mixed_table(samples), start_table(starts)):
        if shown:
            print(shown, end="\n\n")
    if samples:
        print(cores_taken(pair[name] for pair in samples for name in NAMES))
        print(report.content["agreement"])
    print(f"load average {load_average():.1f}; samples in {args.out}")


# --- tables -----------------------------------------------------------------------------------


def both(
    pairs: list[dict[str, Any]], key: str, digits: int = 1, scale: float = 1.0
) -> tuple[str, str, str]:
    """Return a quantity of ours, of vLLM's, and the ratio within pairs."""
    ours, theirs = ([pair[name][key] for pair in pairs] for name in NAMES)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return (
        Spread.of(ours).text(digits, scale),
        Spread.of(theirs).text(digits, scale),
        Spread.of(ratios).text(2),
    )


def row_table(samples: list[dict[str, Any]]) -> str:
    """Return the table of prefill and decode, "" without any."""
    columns = ("row", "ours, tokens/s", "vLLM, tokens/s", "ours / vLLM", "ours, ms", "vLLM, ms")
    lines = []
    for row in dict.fromkeys(sample["row"] for sample in samples if sample["row"] != MIXED):
        pairs = [sample for sample in samples if sample["row"] == row]
        lines.append((row, *both(pairs, "rate"), *both(pairs, "latency", 1, 1000)[:2]))
    legend = "\n\nms: TTFT of a prefill, time between two tokens of a stream in decode"
    return table(columns, lines) + legend if lines else ""


def mixed_table(samples: list[dict[str, Any]]) -> str:
    """Return the table of the mixed load, "" without it."""
    pairs = [sample for sample in samples if sample["row"] == MIXED]
    quantities = (
        ("output tokens/s", "output_rate", 1, 1),
        ("prompt tokens/s", "prompt_rate", 1, 1),
        ("between tokens, median, ms", "gap_p50", 0, 1000),
        ("between tokens, 99th percentile, ms", "gap_p99", 0, 1000),
        ("between tokens, longest, ms", "gap_max", 0, 1000),
        ("TTFT of a prompt, s", "ttft_median", 2, 1),
    )
    lines = [
        (name, *both(pairs, key, digits, scale)) for name, key, digits, scale in quantities if pairs
    ]
    return table(("mixed load", "ours", "vLLM", "ours / vLLM"), lines) if lines else ""


def start_table(starts: list[dict[str, Any]]) -> str:
    """Return the table of start-up times, "" without any."""
    groups = {"first": starts[:1], "later": starts[1:]}
    lines = [
        (f"{name} start, to {what}, s", *both(pairs, key))
        for name, pairs in groups.items()
        for what, key in (("ready", "ready"), ("the first answer", "answer"))
        if pairs
    ]
    return table(("start", "ours", "vLLM", "ours / vLLM"), lines) if lines else ""


# --- command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = p.add_argument
    a("--rounds", type=int, default=5, help="samples a row, behind one not counted (default: 5)")
    a("--prefill", nargs="*", type=int, default=[128, 2048, 8192], help="prompt lengths")
    a("--decode", nargs="*", type=int, default=[1, 8, 32], help="streams at once")
    a("--context", type=int, default=513, help="of streams, in tokens (default: 513)")
    a("--output", type=int, default=33, help="tokens of a decode row's stream (default: 33)")
    a("--window", type=float, default=30, help="of mixed load, s; 0: none (default: 30)")
    a("--streams", type=int, default=8, help="that decode in mixed load (default: 8)")
    a("--mixed-prompt", type=int, default=2048, help="length in mixed load (default: 2048)")
    a("--starts", type=int, default=2, help="of each server, timed (default: 2)")
    a("--kernels", default="native", choices=["native", "torch"], help="ours (default: native)")
    a("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    a(
        "--max-model-len",
        type=int,
        help="longest prompt plus answer of both; mixed load streams until then (default: the "
        "longest prompt, 16384 at least)",
    )
    a(
        "--chunk-tokens",
        type=int,
        help="most tokens of a prompt in one step of both (default: each one's own)",
    )
    add_options(p)
    a("--timeout", type=float, default=1800, help="of one sample, s (default: 1800)")
    a("--out", type=Path, default=RESULTS / "service_vs_vllm.json", help="raw results")
    return p


def arguments() -> argparse.Namespace:
    """Return the checked command line."""
    p = parser()
    args = p.parse_args()
    args.max_model_len = args.max_model_len or max([16384, *args.prefill])
    if args.max_model_len > CONFIG["max_position_embeddings"]:
        p.error(f"the model has positions for {CONFIG['max_position_embeddings']} tokens only")
    needed = max([*args.prefill, args.context + args.output])
    if args.window > 0:
        needed = max(needed, args.mixed_prompt + 1)
    if needed > args.max_model_len:
        p.error(f"--max-model-len {args.max_model_len} is too short for {needed} tokens")
    if args.output < 2:
        p.error("--output must be 2 at least: decode is measured behind the first token")
    return args


def main() -> None:
    end_on_sigterm()
    compare(arguments())


if __name__ == "__main__":
    main()
