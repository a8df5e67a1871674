"""Measures our engine against vLLM's on this machine's CPU, same model, same prompts.

Each engine runs in a process of its own and waits on a pipe while the other is measured. In every
round each row is measured once with each engine, one right behind the other, and which is first
changes from round to round; the ratio is formed within such a pair. A machine that is slow for a
while then makes both slow.

Both are whole engines, scheduler, sampler and all: ours is what a decode worker runs in aggregated
mode, without sockets; vLLM's is its `LLM` class. Both get all cores and all of the prompt's KV
memory they want.

  prefill N   a prompt of N random tokens that neither has seen, and one output token:
              N / seconds.
  decode B    B prompts whose KV is cached: the time for the steps 2 to S+1, as the difference of
              generating S+1 tokens and 1 token: B · S / seconds.

Beside each sample stand the cores that the engine got, and those that other processes and, on a
virtual machine, its host took. The limits are what the cores can do while they run: what a sample
is held against is as much less as the host took. Of reading there are two shares: by the bytes that
are read, and by those that the model has in its dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import (
    CACHE,
    HERE,
    RESULTS,
    Report,
    Spread,
    cores,
    end_group,
    end_on_sigterm,
    group_cpu_seconds,
    last_lines,
    load_average,
    say,
    table,
    wait_for_calm,
)
from engine_limits import limit_shares
from engine_worker import ENGINES, Options, Row, Task
from make_model import ensure_model
from pairs import cores_taken, take_pair, wait_until_idle
from vllm_setup import add_options, ensure_vllm, vllm_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

# --- workers ----------------------------------------------------------------------------------


class Worker:
    """One engine's process, seen from the parent."""

    def __init__(
        self,
        name: str,
        python: Path | str,
        options: Options,
        environment: dict[str, str],
    ) -> None:
        self.name = name
        self.log = CACHE / "logs" / f"{name}-{options.dtype}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [
            *("--model", str(options.model), "--dtype", options.dtype),
            *("--threads", str(options.threads), "--kv-bytes", str(options.kv_bytes)),
            *("--chunk-tokens", str(options.chunk_tokens), "--kernels", options.kernels),
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "engine_worker.py"), name, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,
                text=True,
                bufsize=1,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout

    def wait_until_ready(self, timeout: float) -> float:
        """Return the seconds until it could work, from now."""
        started = time.monotonic()
        self._read(timeout, "to start")
        return time.monotonic() - started

    def ask(self, request: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """Send a request and return the answer, with `cores`: of the machine that it got."""
        self._requests.write(json.dumps(request) + "\n")
        return self._read(timeout, "to measure")

    def cpu_seconds(self) -> float:
        """Return what its processes have used up."""
        return group_cpu_seconds(self._process.pid)

    def _read(self, timeout: float, what: str) -> dict[str, Any]:
        ready, _, _ = select.select([self._answers], [], [], timeout)
        line = self._answers.readline() if ready else ""
        if not line:
            how = "ended" if ready else f"did not answer within {timeout:.0f} s"
            raise SystemExit(
                f"{self.name} was {what} and {how}; {self.log}:\n{last_lines(self.log)}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it; all its processes are gone when this returns."""
        self._requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        end_group(self._process, 20)
        self._answers.close()


@contextlib.contextmanager
def running(
    options: Options, vllm_dtype: str, python: Path, wait_policy: str | None, timeout: float
) -> Iterator[dict[str, Worker]]:
    """Run both engines while the context lasts. They start one after the other."""
    shared = {} if wait_policy is None else {"OMP_WAIT_POLICY": wait_policy}
    starts = {
        "penstock": (Path(sys.executable), shared),
        "vllm": (python, shared | vllm_environment(options.kv_bytes)),
    }
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (interpreter, variables) in starts.items():
            own = options if name == "penstock" else replace(options, dtype=vllm_dtype)
            say(f"starting {name} in {own.dtype}")
            workers[name] = Worker(name, interpreter, own, variables)
            stack.callback(workers[name].close)
            say(f"{name} is ready after {workers[name].wait_until_ready(timeout):.0f} s")
        yield workers


# --- the run ----------------------------------------------------------------------------------


def run_dtype(
    args: argparse.Namespace, dtype: str, python: Path, report: Report
) -> list[dict[str, Any]]:
    """Measure all rows in one dtype; return the samples, also written to the report."""
    rows = [Row("prefill", n) for n in args.prefill] + [Row("decode", n) for n in args.decode]
    options = Options(
        model=args.model,
        dtype=dtype,
        threads=args.threads,
        kv_bytes=args.kv_gib << 30,
        chunk_tokens=args.chunk_tokens,
        kernels=args.kernels,
    )
    vllm_dtype = dtype if args.vllm_dtype == "same" else args.vllm_dtype
    names = list(ENGINES)
    samples: list[dict[str, Any]] = []
    limits: list[dict[str, float]] = []
    with running(options, vllm_dtype, python, args.wait_policy, args.timeout) as workers:
        for number in range(-1, args.rounds):
            order = names if number % 2 else names[::-1]
            for row in rows:
                wait_for_calm(args.wait_for_calm)
                # Prompts of a prefill are new in every round, those of a decode stay cached.
                seed = 1000 + number if row.kind == "prefill" else 0
                task = Task(row, seed, args.context, args.decode_steps)
                ask = partial(Worker.ask, request=asdict(task), timeout=args.timeout)
                pair = take_pair(workers, order, ask)
                ours, theirs = (pair[name]["rate"] for name in ENGINES)
                counted = "warm-up" if number < 0 else f"round {number + 1}/{args.rounds}"
                say(
                    f"{dtype} {counted} {row.name}: ours {ours:,.1f}, vLLM {theirs:,.1f} tokens/s, "
                    f"ratio {ours / theirs:.2f}; {cores_taken(pair.values())}"
                )
                if number >= 0:
                    for worker in workers.values():  # one that spins would take a core
                        wait_until_idle(worker)
                    # Behind each sample: the machine's memory is not always as fast.
                    limits.append(workers["penstock"].ask(None, args.timeout))
                    given = 1 - pair["penstock"]["stolen_cores"] / cores()
                    shares = limit_shares(options, task, ours, limits[-1], given)
                    head = {"row": row.name, "round": number, **asdict(shares)}
                    samples.append(head | pair)
                    result = {"vllm_dtype": vllm_dtype, "limits": limits, "samples": samples}
                    report.write(**{dtype: result})
    return samples


def summary(samples: list[dict[str, Any]]) -> str:
    """Return the table of one dtype."""
    columns = ("row", "ours, tokens/s", "vLLM, tokens/s", "ours / vLLM", "of the limit", "engine")
    lines = []
    for name in dict.fromkeys(sample["row"] for sample in samples):
        pairs = [sample for sample in samples if sample["row"] == name]
        ours, theirs = ([pair[engine] for pair in pairs] for engine in ENGINES)
        ratios = [a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True)]
        lines.append(
            (
                name,
                Spread.of(sample["rate"] for sample in ours).text(),
                Spread.of(sample["rate"] for sample in theirs).text(),
                Spread.of(ratios).text(2),
                _of_the_limit(pairs),
                _share([s | {"around": _around(s)} for s in ours], "around"),
            )
        )
    return table(columns, lines)


def _of_the_limit(samples: list[dict[str, Any]]) -> str:
    def median(key: str) -> str:
        return f"{Spread.of(sample[key] for sample in samples).median:.0%}"

    if samples[0]["model_share"] is None:
        return f"{median('share')} of arithmetic"
    return f"{median('share')} of reading, model {median('model_share')}"


def _around(sample: dict[str, Any]) -> float:
    """Return the seconds of ours in which no step was computed."""
    return max(0.0, float(sample["seconds"] - sample["step"]))


def _share(samples: list[dict[str, Any]], part: str) -> str:
    shares = [sample[part] / sample["seconds"] for sample in samples if part in sample]
    return f"{Spread.of(shares).median:.1%}" if shares else "-"


def agreement(samples: list[dict[str, Any]]) -> str:
    """Tell how often both chose the same first token: do they compute the same model at all?"""
    pairs = [
        (a[0], b[0])
        for sample in samples
        for a, b in zip(sample["penstock"]["first"], sample["vllm"]["first"], strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    return f"the first token was the same behind {same} of {len(pairs)} prompts"


def limits_text(limits: list[dict[str, float]]) -> str:
    """Return the machine's limits over the rounds."""
    names = {
        "float32_gflops": "GFLOP/s float32",
        "bfloat16_gflops": "GFLOP/s bfloat16",
        "read_gbytes": "GB/s read",
    }
    return "limits of the machine in this run: " + "; ".join(
        f"{Spread.of(sample[key] for sample in limits).text()} {unit}"
        for key, unit in names.items()
        if key in limits[0]
    )


def compare(args: argparse.Namespace) -> None:
    """Run the benchmark."""
    ensure_model(args.model)
    python = ensure_vllm(args.vllm_python)
    report = Report(args.out)
    for dtype in args.dtype:
        samples = run_dtype(args, dtype, python, report)
        theirs = report.content[dtype]["vllm_dtype"]
        print(f"\n{dtype}, vLLM in {theirs}; median (minimum to maximum) of {args.rounds} rounds\n")
        print(summary(samples))
        print(f"\n{limits_text(report.content[dtype]['limits'])}")
        print(f"{cores_taken(s[name] for s in samples for name in ENGINES)}; {agreement(samples)}")
        print(f"load average {load_average():.1f}; samples in {args.out}\n", flush=True)


# --- command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = p.add_argument
    a("--rounds", type=int, default=5, help="samples a row, behind one not counted (default: 5)")
    a("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    a(
        "--vllm-dtype",
        default="same",
        choices=["same", "bfloat16", "float32"],
        help="float32 where the processor has no products of bfloat16, which vLLM then emulates: "
        "each engine at its best (default: same)",
    )
    a("--kernels", default="native", choices=["native", "torch"], help="ours (default: native)")
    a("--prefill", nargs="*", type=int, default=[128, 2048, 8192], help="prompt lengths")
    a("--decode", nargs="*", type=int, default=[1, 8, 32], help="batch sizes")
    a("--context", type=int, default=512, help="of decode rows, in tokens (default: 512)")
    a("--decode-steps", type=int, default=32, help="timed steps a sample (default: 32)")
    a("--threads", type=int, default=cores(), help="of our engine (default: all cores)")
    a("--chunk-tokens", type=int, default=512, help="our longest prefill step (default: 512)")
    add_options(p)
    a("--timeout", type=float, default=1800, help="of one sample or start, s (default: 1800)")
    a("--out", type=Path, default=RESULTS / "engine_vs_vllm.json", help="raw results")
    return p


def main() -> None:
    end_on_sigterm()
    compare(parser().parse_args())


if __name__ == "__main__":
    main()
