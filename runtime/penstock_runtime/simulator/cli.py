"""The planning commands: explain-chunks, plan-capacity, timeline. Parsing and printing only."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock_runtime.engine.timeline import (
    MAX_TRACE_BYTES,
    TraceError,
    decode_trace,
    encode_trace,
    merge,
    spans_of,
    trace_of,
)
from penstock_runtime.scheduler.chunk_planner import ChunkSettings
from penstock_runtime.scheduler.layer_split import layer_counts
from penstock_runtime.simulator import costs, report
from penstock_runtime.simulator.capacity import GroupModel, NoCapacity, Targets, plan_capacity
from penstock_runtime.simulator.decode import DecodeModel
from penstock_runtime.simulator.explain import Question, explain
from penstock_runtime.simulator.hardware import Hardware, Link
from penstock_runtime.simulator.svg import timeline_svg
from penstock_runtime.simulator.workload import (
    PoissonLoad,
    TraceInvalid,
    read_trace,
    scale_rate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.scheduler.cost_model import Cost
    from penstock_runtime.simulator.hardware import StageModel
    from penstock_runtime.simulator.workload import Arrival

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - no public name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 the answer is no, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m penstock_runtime.simulator",
        description="Questions about prefill pipelines, answered by simulation.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_explain_chunks(subparsers)
    add_plan_capacity(subparsers)
    add_timeline(subparsers)
    args = parser.parse_args(arguments)
    code: int = args.handler(args)
    return code


# --- explain-chunks ------------------------------------------------------------------------------


def add_explain_chunks(subparsers: Subparsers) -> None:
    """Add the command that shows how a prompt is cut, and why."""
    parser = subparsers.add_parser(
        "explain-chunks",
        help="show how a prompt is cut into chunks, and what the pipeline does with them",
        description="Simulate a prompt on an idle prefill group with the scheduler that serves, "
        "and print the plan, its times and the optimum.",
        epilog="example:\n  penstock explain-chunks --prompt-tokens 131072 --stages 8 "
        "--cost c=0.01,b=2.7e-5,a=2e-10 --svg plan.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=_explain_chunks)
    a = parser.add_argument
    a("--prompt-tokens", type=_positive, required=True, metavar="N", help="length of a prompt")
    a(
        "--cached",
        type=_count,
        default=0,
        metavar="N",
        help="of it in the prefix cache (default: 0)",
    )
    a("--prompts", type=_positive, default=1, metavar="N", help="sent at once (default: 1)")
    a(
        "--layers",
        type=layer_counts,
        metavar="N,N",
        help="of each stage now, such as 8.5,7.5: say how to divide them by what the stages "
        "measured (default: what --group says)",
    )
    a(
        "--attention-share",
        type=_share,
        default=0.25,
        metavar="F",
        help="part of a layer's weights that its attention has, for --layers (default: 0.25)",
    )
    _pipeline_options(parser)
    a("--svg", type=Path, metavar="FILE", help="write the timeline as a picture")
    a("--trace", type=Path, metavar="FILE", help="write it for chrome://tracing or ui.perfetto.dev")
    a("--json", type=Path, metavar="FILE", help="write the plan and its figures")


def _explain_chunks(args: argparse.Namespace) -> int:
    try:
        models, known_layers = _stages(args)
        question = Question(
            prompt_tokens=args.prompt_tokens,
            cached_tokens=args.cached,
            prompts=args.prompts,
            page_size=args.page_size,
            costs=_costs(models),
            chunks=_chunks(args),
            hardware=_hardware(args, models),
        )
        answer = explain(question)
        layers = args.layers or known_layers
        advice = report.layer_advice(question, layers, args.attention_share) if layers else ""
    except (costs.CostsUnknown, ValueError) as error:
        return _wrong(error)
    print(report.explanation_text(question, answer) + advice)
    title = f"{report.question_line(question)} (simulated)"
    if args.svg:
        args.svg.write_text(timeline_svg(answer.spans, title), encoding="utf-8")
    if args.trace:
        args.trace.write_bytes(encode_trace(trace_of(answer.spans, kind="simulated")))
    if args.json:
        args.json.write_bytes(report.pretty(report.explanation_json(question, answer)))
    return 0


# --- plan-capacity -------------------------------------------------------------------------------


def add_plan_capacity(subparsers: Subparsers) -> None:
    """Add the command that says how many groups and workers a load needs."""
    parser = subparsers.add_parser(
        "plan-capacity",
        help="say how many prefill groups and decode workers a load needs",
        description="Simulate a load on more and more prefill groups and decode workers until the "
        "targets hold.",
        epilog="example:\n  penstock plan-capacity --trace conversation.jsonl --stages 4 "
        "--cost c=0.01,b=2.7e-5,a=2e-10 --decode-step 0.02 --decode-token 2e-8 "
        "--ttft 5 --itl 0.05",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=_plan_capacity)
    a = parser.add_argument
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="arrivals as JSON lines: timestamp (ms), input_length, output_length, hash_ids",
    )
    load.add_argument("--rate", type=_above_zero, metavar="R", help="Poisson arrivals a second")
    a("--scale", type=_above_zero, default=1.0, metavar="F", help="F times the load (default: 1)")
    a("--requests", type=_positive, default=1000, metavar="N", help="at most (default: 1000)")
    a("--input-tokens", type=_above_zero, default=8192, metavar="N", help="mean (default: 8192)")
    a("--output-tokens", type=_above_zero, default=256, metavar="N", help="mean (default: 256)")
    a(
        "--spread",
        type=_at_least_zero,
        default=0.5,
        help="standard deviation of the logarithm of both lengths (default: 0.5)",
    )
    a("--seed", type=_count, default=0, help="of the arrivals (default: 0)")
    _pipeline_options(parser)
    a(
        "--kv-tokens",
        type=_positive,
        default=2_000_000,
        metavar="N",
        help="KV that a group's smallest stage holds, cached prefixes included (default: 2000000)",
    )
    a(
        "--decode-step",
        type=_at_least_zero,
        default=0.02,
        metavar="S",
        help="a step (default: 0.02)",
    )
    a("--decode-request", type=_at_least_zero, default=1e-4, metavar="S", help="for each request")
    a("--decode-token", type=_at_least_zero, default=2e-8, metavar="S", help="for each KV token")
    a("--decode-batch", type=_positive, default=64, metavar="N", help="most requests (default: 64)")
    a("--decode-kv-tokens", type=_positive, default=2_000_000, metavar="N", help="KV of a worker")
    a("--ttft", type=_above_zero, required=True, metavar="S", help="target: time to first token")
    a("--itl", type=_above_zero, required=True, metavar="S", help="target: time between tokens")
    a("--percentile", type=_above_zero, default=99.0, metavar="P", help="of both (default: 99)")
    a("--most", type=_positive, default=64, metavar="N", help="of each to try (default: 64)")
    a("--json", type=Path, metavar="FILE", help="write what was simulated")


def _plan_capacity(args: argparse.Namespace) -> int:
    try:
        models, _ = _stages(args)
        group = GroupModel(
            costs=_costs(models),
            chunks=_chunks(args),
            hardware=_hardware(args, models),
            page_size=args.page_size,
            kv_tokens=args.kv_tokens,
        )
        decode = DecodeModel(
            step=args.decode_step,
            request=args.decode_request,
            token=args.decode_token,
            max_batch=args.decode_batch,
            kv_tokens=args.decode_kv_tokens,
        )
        targets = Targets(ttft=args.ttft, itl=args.itl, percent=args.percentile)
        arrivals = _arrivals(args)
    except (costs.CostsUnknown, TraceInvalid, OSError, ValueError) as error:
        return _wrong(error)
    try:
        candidates = plan_capacity(arrivals, group, decode, targets, most=args.most)
    except NoCapacity as error:
        print(f"plan-capacity: {error}", file=sys.stderr)
        return 1
    print(report.capacity_text(arrivals, candidates, targets))
    if args.json:
        found = {"kind": "simulated", "candidates": [asdict(c) for c in candidates]}
        args.json.write_bytes(report.pretty(found | {"targets": asdict(targets)}))
    return 0


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    if args.trace:
        return scale_rate(read_trace(args.trace, limit=args.requests), args.scale)
    load = PoissonLoad(
        rate=args.rate * args.scale,
        requests=args.requests,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        spread=args.spread,
        seed=args.seed,
    )
    return load.arrivals()


# --- timeline ------------------------------------------------------------------------------------


def add_timeline(subparsers: Subparsers) -> None:
    """Add the command that fetches what the stages of a running group did."""
    parser = subparsers.add_parser(
        "timeline",
        help="fetch the recent steps of a running prefill group, as a trace or a picture",
        description="Ask every stage of a prefill group for its recent steps and join the answers.",
        epilog="example:\n  penstock timeline http://127.0.0.1:9100 http://127.0.0.1:9101 "
        "--trace steps.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=_timeline)
    a = parser.add_argument
    a("workers", nargs="+", metavar="URL", help="http://host:port of each stage's health and state")
    a("--request", metavar="TEXT", help="only steps with a request whose name has this in it")
    a("--svg", type=Path, metavar="FILE", help="write the timeline as a picture")
    a("--trace", type=Path, metavar="FILE", help="write it for chrome://tracing or ui.perfetto.dev")


def _timeline(args: argparse.Namespace) -> int:
    try:
        traces = [
            decode_trace(costs.fetch(worker.rstrip("/") + "/timeline", limit=MAX_TRACE_BYTES))
            for worker in args.workers
        ]
        joined = merge(traces)
        spans = spans_of(joined)
    except (costs.CostsUnknown, TraceError) as error:
        return _wrong(error)
    if args.request:
        spans = [s for s in spans if any(args.request in chunk.request for chunk in s.chunks)]
    if not spans:
        return _wrong(ValueError("no such step has been recorded"))
    print(report.timeline_text(spans, joined.otherData))
    if args.svg:
        args.svg.write_text(timeline_svg(spans, "recent steps (measured)"), encoding="utf-8")
    if args.trace:
        kept = {(s.epoch, s.step, s.stage) for s in spans}
        events = [
            event
            for event in joined.traceEvents
            if event.ph == "M" or (event.args["epoch"], event.args["step"], event.pid) in kept
        ]
        args.trace.write_bytes(encode_trace(msgspec.structs.replace(joined, traceEvents=events)))
    return 0


# --- options that commands share -----------------------------------------------------------------


def _pipeline_options(parser: argparse.ArgumentParser) -> None:
    defaults = ChunkSettings()
    a = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--cost",
        action="append",
        metavar="C",
        help="coefficients of a stage, c=SECONDS,gamma=…,b=…,a=…[,saturation=TOKENS]: "
        "t = c + gamma L + b x + a (2 L x + x²); once for all stages, or once for each",
    )
    source.add_argument("--cost-file", type=Path, metavar="FILE", help="the same as JSON")
    source.add_argument(
        "--group", metavar="URL", help="what stage 0 of a running group measured: http://host:port"
    )
    a("--stages", type=_positive, metavar="P", help="stages (default: as there are coefficients)")
    a("--page-size", type=_positive, default=64, metavar="N", help="tokens (default: 64)")
    a("--chunk-mode", choices=["adaptive", "fixed"], default=defaults.mode)
    a(
        "--max-chunk-tokens",
        type=_positive,
        default=defaults.max_tokens,
        metavar="N",
        help=f"of a step; with --chunk-mode fixed, of every step (default: {defaults.max_tokens})",
    )
    a(
        "--least-chunk-tokens",
        type=_count,
        default=defaults.saturation_tokens,
        metavar="N",
        help=f"a size below which linear layers would idle (default: {defaults.saturation_tokens})",
    )
    a("--bandwidth", type=_above_zero, metavar="B", help="bytes/s to the next stage (default: ∞)")
    a("--latency", type=_at_least_zero, default=0.0, metavar="S", help="of every link (default: 0)")
    a("--activation-bytes", type=_count, default=0, metavar="N", help="a token (default: 0)")
    a("--kv-bandwidth", type=_above_zero, metavar="B", help="bytes/s to decode (default: ∞)")
    a("--kv-bytes", type=_count, default=0, metavar="N", help="a token and stage (default: 0)")
    a("--noise", type=_at_least_zero, default=0.0, metavar="SIGMA", help="of the log of step times")


def _stages(args: argparse.Namespace) -> tuple[tuple[StageModel, ...], Sequence[float]]:
    """Return a model of each stage, and how many layers it has, where that is known."""
    if args.cost:
        found = costs.Measured([costs.from_text(text) for text in args.cost], [])
    elif args.cost_file:
        found = costs.from_file(args.cost_file)
    else:
        found = costs.from_worker(args.group)
    models = costs.for_stages(found.models, args.stages)
    return models, found.layers if len(found.layers) == len(models) > 1 else []


def _costs(models: Sequence[StageModel]) -> tuple[Cost, ...]:
    return tuple(model.cost for model in models)


def _chunks(args: argparse.Namespace) -> ChunkSettings:
    return ChunkSettings(
        mode=args.chunk_mode,
        fixed_tokens=args.max_chunk_tokens,
        max_tokens=args.max_chunk_tokens,
        saturation_tokens=args.least_chunk_tokens,
    )


def _hardware(args: argparse.Namespace, models: tuple[StageModel, ...]) -> Hardware:
    return Hardware(
        stages=models,
        activations=Link(args.bandwidth or float("inf"), args.latency),
        activation_bytes=args.activation_bytes,
        kv=Link(args.kv_bandwidth or float("inf"), args.latency),
        kv_bytes=args.kv_bytes,
        control_latency=args.latency,
        noise=args.noise,
    )


def _wrong(error: Exception) -> int:
    print(error, file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _share(text: str) -> float:
    value = _above_zero(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def _at_least_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _above_zero(text: str) -> float:
    value = _at_least_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is too little")
    return value
