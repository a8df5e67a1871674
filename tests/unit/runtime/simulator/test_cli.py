"""The planning commands as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from penstock_runtime.engine.timeline import (
    SpanChunk,
    StepSpan,
    decode_trace,
    encode_trace,
    spans_of,
    trace_of,
)
from penstock_runtime.simulator.cli import main

COST = "c=0.01,b=2.67e-5,a=2e-10"
SAMPLE = Path(__file__).parent / "sample_trace.jsonl"


def test_torch_is_never_loaded() -> None:
    code = (
        "import sys, penstock_runtime.simulator.cli\n"
        "print([m for m in ('torch', 'nixl', 'zmq', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_explain_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("plan.svg", "plan.json", "trace.json")]
    arguments = ["explain-chunks", "--prompt-tokens", "20000", "--cost", COST, "--stages", "4"]
    arguments += ["--svg", str(files[0]), "--json", str(files[1]), "--trace", str(files[2])]
    assert (
        main([*arguments, "--layers", "8,7.5,7,7.5", "--bandwidth", "1e9", "--latency", "1e-4"])
        == 0
    )
    text = capsys.readouterr().out
    assert "closed-form optimum" in text
    # Whoever has less takes as long: so the layers of the second cost more than those of the first.
    assert "of 30 would be even by what the stages cost; now they are 8/7.5/7/7.5" in text
    assert "(simulated)" in files[0].read_text(encoding="utf-8")
    plan = json.loads(files[1].read_bytes())
    trace = decode_trace(files[2].read_bytes())
    assert len(spans_of(trace)) == 4 * len(plan["steps"])
    assert trace.otherData.kind == "simulated"


def test_costs_that_do_not_fit_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["explain-chunks", "--prompt-tokens", "1000"]
    assert main([*base, "--cost", COST, "--cost", COST, "--stages", "3"]) == 2
    assert "2 stages do not describe 3" in capsys.readouterr().err
    assert main([*base, "--cost", "nonsense"]) == 2
    assert main([*base, "--cost", COST, "--cached", "1000"]) == 2
    assert "nothing to compute" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(base)
    assert refused.value.code == 2


def test_plan_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "capacity.json"
    targets = ["--ttft", "1", "--itl", "0.05", "--percentile", "95", "--json", str(file)]
    arguments = ["plan-capacity", "--trace", str(SAMPLE), "--cost", COST, "--stages", "2"]
    assert main([*arguments, *targets]) == 0
    text = capsys.readouterr().out
    assert "24 requests" in text
    assert "simulated" in text
    found = json.loads(file.read_bytes())
    assert found["kind"] == "simulated"
    assert found["candidates"][-1]["meets"]
    assert found["candidates"][-1]["cached_share"] > 0.1
    poisson = ["plan-capacity", "--rate", "2", "--requests", "40", "--cost", COST, "--stages", "2"]
    assert main([*poisson, *targets]) == 0
    assert "40 requests" in capsys.readouterr().out


def test_no_capacity_is_an_answer_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan-capacity", "--trace", str(SAMPLE), "--cost", COST, "--most", "2"]
    assert main([*arguments, "--ttft", "0.001", "--itl", "0.05"]) == 1
    assert "loosen the targets" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "nowhere.jsonl")
    assert main([*arguments, "--ttft", "1", "--itl", "0.05"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_timeline_of_a_running_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        f"/{stage}/timeline": encode_trace(
            trace_of(
                [
                    StepSpan(stage, n, 10.0 + n + stage, 11.0 + n + stage, 0.0, chunks)
                    for n, chunks in enumerate(
                        [(SpanChunk(0, 0, 64, "d#1"),), (SpanChunk(1, 0, 64, "d#2"),)]
                    )
                ],
                kind="measured",
            )
        )
        for stage in range(2)
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, b""))

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        files = tmp_path / "steps.json", tmp_path / "steps.svg"
        arguments = ["timeline", f"{base}/0", f"{base}/1/", "--request", "#2"]
        assert main([*arguments, "--trace", str(files[0]), "--svg", str(files[1])]) == 0
        assert "hosts' clocks differ" in capsys.readouterr().out
        spans = spans_of(decode_trace(files[0].read_bytes()))
        assert [(s.stage, s.step, s.begin) for s in spans] == [(0, 1, 1.0), (1, 1, 2.0)]
        assert "(measured)" in files[1].read_text(encoding="utf-8")
        assert main(["timeline", f"{base}/0", "--request", "#9"]) == 2
        assert main(["timeline", f"{base}/7"]) == 2
        assert "404" in capsys.readouterr().err
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
