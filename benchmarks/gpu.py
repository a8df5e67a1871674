"""Measures our engine on a GPU: against what the GPU can do, and against other engines.

  decode B    B sequences of --context tokens: the time for the steps 2 to S+1, as the difference of
              generating S+1 tokens and 1 token. Given as tokens/s, and as the bytes that a step
              must read (weights and KV) a second, as a fraction of the read limit.
  prefill N   a prompt of N random tokens that no engine has seen, and one output token. Given as
              tokens/s, and as a fraction of matrix peak by the operations of the prompt.

Both limits are measured in the same run, before every round: reading by summing 4 GiB, matrix peak
by bfloat16 products of 8192 x 8192, the best of several. Ours is what a decode worker runs in
aggregated mode, with scheduler and sampler and CUDA graphs, without sockets. transformers is its
`generate`; vLLM is measured if --vllm-python names an interpreter that has it, or this one has.

In every round each row is measured once with each engine, one behind the other; who is first
changes from round to round, and ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import RESULTS, Report, Spread, end_on_sigterm, say, table
from engine_penstock import Engine as Ours
from engine_transformers import Engine as Transformers
from engine_vs_vllm import Worker
from engine_worker import Options, Row, Task, measure
from gpu_model import SHAPES, ensure_model

from penstock_runtime.cuda_device import find_device
from penstock_runtime.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine_worker import Engine
    from gpu_model import Shape

READ_BYTES = 4 << 30
MATRIX = 8192
REPEATS = 10
OURS = "penstock"


# --- the GPU ----------------------------------------------------------------------------------


def require_gpu() -> torch.device:
    """Return the GPU, or end with what is missing."""
    try:
        return find_device("cuda")
    except ConfigurationError as error:
        raise SystemExit(f"gpu.py measures a GPU. {error}") from error


def gpu_description() -> dict[str, Any]:
    """Return what a reader needs to know of the GPU and the software to compare with theirs."""
    properties = torch.cuda.get_device_properties(0)
    versions = {}
    for package in ("torch", "flashinfer-python", "transformers", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def limits() -> dict[str, float]:
    """Return bytes read a second, and bfloat16 operations a second."""
    read = READ_BYTES / _best_seconds(torch.sum, torch.ones(READ_BYTES // 4, device="cuda"))
    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    peak = 2 * MATRIX**3 / _best_seconds(torch.mm, a, b)
    return {"read_bytes": read, "matrix_flops": peak}


def _best_seconds(function: Callable[..., object], *arguments: torch.Tensor) -> float:
    function(*arguments)
    times: list[float] = []
    for _ in range(REPEATS):
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        function(*arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times)


def fraction(shape: Shape, task: Task, rate: float, limit: dict[str, float]) -> float:
    """Return which part of its limit a sample of `rate` tokens/s reached."""
    row = task.row
    if row.kind == "prefill":
        return shape.prefill_flops(row.size) * rate / row.size / limit["matrix_flops"]
    context = task.context + task.steps / 2
    return shape.decode_bytes(row.size, context) * rate / row.size / limit["read_bytes"]


# --- engines ----------------------------------------------------------------------------------


@contextlib.contextmanager
def engines(
    options: Options, vllm_python: Path | None, timeout: float
) -> Iterator[dict[str, Callable[[Task], dict[str, Any]]]]:
    """Start the engines one after the other; yield what takes a sample with each."""

    def here(engine: Engine) -> Callable[[Task], dict[str, Any]]:
        return lambda task: measure(engine, task)

    with contextlib.ExitStack() as stack:
        found: dict[str, Callable[[Task], dict[str, Any]]] = {}
        if vllm_python is not None:
            say("starting vllm")
            worker = Worker("vllm", vllm_python, options, {"HF_HUB_OFFLINE": "1"})
            stack.callback(worker.close)
            worker.wait_until_ready(timeout)
            found["vllm"] = lambda task: worker.ask(asdict(task), timeout)
        say("starting penstock")
        found = {OURS: here(Ours(options, device="cuda")), **found}
        say("starting transformers")
        yield found | {"transformers": here(Transformers(options))}


# --- the run ----------------------------------------------------------------------------------


def run(args: argparse.Namespace, report: Report) -> list[dict[str, Any]]:
    """Measure all rows; return the samples, also written to the report."""
    shape = SHAPES[args.size]
    rows = [Row("prefill", n) for n in args.prefill] + [Row("decode", n) for n in args.decode]
    options = Options(
        model=ensure_model(args.size),
        dtype="bfloat16",
        threads=1,
        kernels="torch",
        kv_bytes=args.kv_gib << 30,
        chunk_tokens=args.chunk_tokens,
    )
    samples: list[dict[str, Any]] = []
    with engines(options, args.vllm_python, args.timeout) as found:
        names = list(found)
        for number in range(-1, args.rounds):
            limit = limits()
            order = names if number % 2 else names[::-1]
            for row in rows:
                seed = 1000 + number if row.kind == "prefill" else 0
                task = Task(row, seed, args.context, args.decode_steps)
                taken = {name: found[name](task) for name in order}
                for each in taken.values():
                    each["fraction"] = fraction(shape, task, each["rate"], limit)
                say(f"round {number + 1}/{args.rounds} {row.name}: {_line(taken)}")
                if number >= 0:
                    samples.append({"row": row.name, "round": number, "limits": limit, **taken})
                    report.write(samples=samples)
    return samples


def _line(taken: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} {each['rate']:,.0f} tokens/s ({each['fraction']:.0%})"
        for name, each in taken.items()
    )


def summary(samples: list[dict[str, Any]]) -> str:
    """Return the table."""
    others = [name for name in ("transformers", "vllm") if name in samples[0]]
    columns = ["row", "ours, tokens/s", "of the limit, %", *(f"ours / {name}" for name in others)]
    lines = []
    for row in dict.fromkeys(sample["row"] for sample in samples):
        chosen = [sample for sample in samples if sample["row"] == row]
        ours = [sample[OURS] for sample in chosen]
        ratios = (
            Spread.of(sample[OURS]["rate"] / sample[name]["rate"] for sample in chosen).text(2)
            for name in others
        )
        lines.append(
            [
                row,
                Spread.of(sample["rate"] for sample in ours).text(0),
                Spread.of(sample["fraction"] for sample in ours).text(1, 100),
                *ratios,
            ]
        )
    return table(columns, lines)


def agreement(samples: list[dict[str, Any]]) -> str:
    """Tell how often the engines chose our first token: do they compute the same model at all?"""
    said = []
    for name in ("transformers", "vllm"):
        pairs = [
            (ours[0], theirs[0])
            for sample in samples
            if name in sample
            for ours, theirs in zip(sample[OURS]["first"], sample[name]["first"], strict=True)
        ]
        if pairs:
            same = sum(a == b for a, b in pairs)
            said.append(f"{name} chose our first token behind {same} of {len(pairs)} prompts")
    return "; ".join(said)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a = p.add_argument
    a("--size", choices=SHAPES, default="8b", help="of the model, random weights (default: 8b)")
    a("--rounds", type=int, default=5, help="samples a row, behind one not counted (default: 5)")
    a("--prefill", nargs="*", type=int, default=[512, 2048, 8192], help="prompt lengths")
    a("--decode", nargs="*", type=int, default=[1, 8, 32], help="batch sizes")
    a("--context", type=int, default=2048, help="of decode rows, in tokens (default: 2048)")
    a("--decode-steps", type=int, default=64, help="timed steps a sample (default: 64)")
    a("--chunk-tokens", type=int, default=8192, help="our longest step (default: 8192)")
    a("--kv-gib", type=int, default=16, help="KV memory of our engine, GiB (default: 16)")
    own = Path(sys.executable) if importlib.util.find_spec("vllm") else None
    a("--vllm-python", type=Path, default=own, help="an interpreter that has vLLM (default: none)")
    a("--timeout", type=float, default=1800, help="of one sample or start of vLLM, s")
    a("--out", type=Path, default=RESULTS / "gpu.json", help="raw results")
    return p


def main() -> None:
    end_on_sigterm()
    args = parser().parse_args()
    require_gpu()
    report = Report(args.out)
    report.write(gpu=gpu_description(), size=args.size)
    samples = run(args, report)
    print(f"\n{report.content['gpu']['name']}, {args.size}, bfloat16; median (minimum to maximum)")
    print(f"of {args.rounds} rounds\n\n{summary(samples)}\n")
    for key, unit, scale in (("read_bytes", "GB/s read", 1e-9), ("matrix_flops", "TFLOP/s", 1e-12)):
        spread = Spread.of(sample["limits"][key] for sample in samples)
        print(f"limit in this run: {spread.text(0, scale)} {unit}")
    print(f"{agreement(samples)}; samples in {args.out}")


if __name__ == "__main__":
    main()
