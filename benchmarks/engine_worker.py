"""One engine in a process of its own: the worker side of `engine_vs_vllm.py`.

Started by it with the interpreter that has the engine. Requests and answers are JSON lines on
standard input and output; between two requests the process blocks on the pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from common import prompts

ENGINES = {"penstock": "engine_penstock", "vllm": "engine_vllm"}
"""Modules with a class `Engine`. Only one of the two can be imported in an environment."""
MAX_MODEL_LEN = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a worker is told."""

    model: Path
    dtype: str
    threads: int
    kv_bytes: int
    chunk_tokens: int
    kernels: Literal["native", "torch"]
    """Ours only."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    kind: Literal["prefill", "decode"]
    size: int
    """Prompt tokens of a prefill, sequences of a decode batch."""

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.kind} {self.size:,}"


@dataclass(frozen=True, slots=True)
class Task:
    """One sample of a row."""

    row: Row
    seed: int
    context: int
    """Cached tokens of a sequence when its decoding begins."""
    steps: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine did."""

    seconds: float
    tokens: list[list[int]]


class Engine(Protocol):
    """What is measured."""

    def generate(self, prompt_tokens: list[list[int]], count: int) -> Generated:
        """Generate `count` tokens greedily behind each prompt, all at once."""
        ...

    def parts(self) -> dict[str, float]:
        """Return what it counted of its parts since the last call; see the engine's own."""
        ...

    def limits(self) -> dict[str, float]:
        """Return what the machine can do at most, if this engine is to measure it."""
        ...


def measure(engine: Engine, task: Task) -> dict[str, Any]:
    """Take one sample."""
    row = task.row
    if row.kind == "prefill":
        engine.parts()
        done = engine.generate(prompts(task.seed, 1, row.size), 1)
        rate = row.size / done.seconds
        return {"rate": rate, "seconds": done.seconds, "first": done.tokens, **engine.parts()}
    # The last token of a prompt is never cached: it is the first step.
    batch = prompts(task.seed, row.size, task.context + 1)
    first = engine.generate(batch, 1)
    one = engine.generate(batch, 1)
    engine.parts()
    all_steps = engine.generate(batch, 1 + task.steps)
    parts = engine.parts()
    seconds = all_steps.seconds - one.seconds
    return {
        "rate": row.size * task.steps / seconds,
        "seconds": seconds,
        "first": first.tokens,
        # Of one step more than `seconds` are.
        **{name: part * task.steps / (1 + task.steps) for name, part in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    for name in ("--threads", "--kv-bytes", "--chunk-tokens"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--kernels", required=True)
    arguments = vars(parser.parse_args())
    # Engines print; what they print goes to the log, and the pipe is for answers only.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        module = import_module(ENGINES[arguments.pop("engine")])
        engine: Engine = module.Engine(Options(**arguments))
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            if request is None:
                answer: dict[str, Any] = engine.limits()
            else:
                answer = measure(engine, Task(**request | {"row": Row(**request["row"])}))
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
