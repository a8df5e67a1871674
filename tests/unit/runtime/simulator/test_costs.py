"""Coefficients from flags, files and running groups, and what is refused."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.simulator import costs
from penstock_runtime.simulator.costs import CostsUnknown
from penstock_runtime.simulator.hardware import StageModel
from penstock_runtime.worker.metrics import WorkerCollector
from penstock_runtime.worker.settings import parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATE = {
    "role": "prefill",
    "layers_per_stage": [8.5, 7.5],
    "costs": [
        {"c": 0.01, "gamma": 1e-8, "b": 1e-5, "a": 1e-10, "error": 0.02},
        {"c": 0.02, "gamma": 0.0, "b": 2e-5, "a": 2e-10, "error": 0.02},
    ],
}
MODELS = [StageModel(Cost(0.01, 1e-8, 1e-5, 1e-10)), StageModel(Cost(0.02, 0.0, 2e-5, 2e-10))]


def test_a_flag() -> None:
    assert costs.from_text("c=0.01,b=2e-5") == StageModel(Cost(0.01, 0.0, 2e-5, 0.0))
    whole = costs.from_text("c=1,gamma=2,b=3,a=4,saturation=5")
    assert whole == StageModel(Cost(1, 2, 3, 4), 5)


@pytest.mark.parametrize("text", ["", "c=1", "c=1,b=x", "c=1,b=-1", "c=nan,b=1", "c=1,b=inf"])
def test_strange_flags(text: str) -> None:
    with pytest.raises(CostsUnknown, match="is not c=SECONDS"):
        costs.from_text(text)


def test_a_file_of_one_stage_or_of_several(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(STATE["costs"]), encoding="utf-8")
    assert costs.from_file(file) == costs.Measured(MODELS, [])
    file.write_text(json.dumps({"c": 0.02, "b": 2e-5, "a": 2e-10}), encoding="utf-8")
    assert costs.from_file(file) == costs.Measured(MODELS[1:], [])


def test_a_file_may_be_a_worker_s_state(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text(json.dumps(STATE), encoding="utf-8")
    assert costs.from_file(file) == costs.Measured(MODELS, [8.5, 7.5])
    file.write_text(json.dumps(STATE | {"layers_per_stage": [8.5]}), encoding="utf-8")
    assert costs.from_file(file).layers == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"c": -1, "b": 1}]', '{"costs": 3}', "[1]"])
def test_strange_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CostsUnknown, match=r"costs\.json"):
        costs.from_file(file)
    with pytest.raises(CostsUnknown, match="cannot read"):
        costs.from_file(tmp_path / "nowhere.json")


def test_one_stage_stands_for_all() -> None:
    assert costs.for_stages(MODELS[:1], 3) == (MODELS[0],) * 3
    assert costs.for_stages(MODELS, None) == tuple(MODELS)
    with pytest.raises(CostsUnknown, match="2 stages do not describe 3"):
        costs.for_stages(MODELS, 3)


# --- a running group ------------------------------------------------------------------------------


def _metrics() -> bytes:
    arguments = "--role prefill --name p --model file:///m --bind :1 --http :2 --keys k --group g"
    registry = CollectorRegistry()
    registry.register(WorkerCollector(parse(arguments.split()), lambda: STATE))
    return generate_latest(registry)


PAGES = {
    "/state": json.dumps(STATE).encode(),
    "/metrics": _metrics(),
    "/idle/state": b'{"role": "decode"}',
    "/empty/metrics": b"penstock_steps_total 1.0\n",
    "/large/state": b" " * (4 * 1024 * 1024 + 1),
}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = PAGES.get(self.path)
        self.send_response(200 if page is not None else 404)
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/", "/state", "/metrics"])
def test_what_a_group_measured(worker: str, path: str) -> None:
    measured = costs.from_worker(worker + path)
    assert measured.models == MODELS
    assert measured.layers == ([] if path == "/metrics" else [8.5, 7.5])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/idle/state", "only stage 0"),
        ("/empty/metrics", "0 stages"),
        ("/large/state", "more than"),
        ("/elsewhere", "no answer"),
    ],
)
def test_workers_that_know_none(worker: str, path: str, message: str) -> None:
    with pytest.raises(CostsUnknown, match=message):
        costs.from_worker(worker + path)


def test_only_http_is_asked() -> None:
    with pytest.raises(CostsUnknown, match="not an http"):
        costs.from_worker("file:///etc/passwd")
