"""What the router tells Prometheus. One registry an instance, so that tests can have several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from penstock_router.policy import Choice, Demand
    from penstock_router.workers import Fleet, Worker

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_ROUTER_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25)


class Metrics:
    """The router's instruments."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.ttft = Histogram(
            "penstock_ttft_seconds",
            "Time from a request's arrival to its first token.",
            registry=registry,
            buckets=_TTFT_BUCKETS,
        )
        self.itl = Histogram(
            "penstock_itl_seconds",
            "Time between two tokens of a completion.",
            registry=registry,
            buckets=_ITL_BUCKETS,
        )
        self.e2e = Histogram(
            "penstock_request_seconds",
            "Time from a request's arrival to its end.",
            registry=registry,
            buckets=_E2E_BUCKETS,
        )
        self.prepare = Histogram(
            "penstock_router_prepare_seconds",
            "Time to validate, render, tokenize and hash a request in the router.",
            registry=registry,
            buckets=_ROUTER_BUCKETS,
        )
        self.requests = Counter(
            "penstock_requests",
            "Requests for completions, by endpoint and outcome (an HTTP status, error, cancelled).",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.retries = Counter(
            "penstock_retries",
            "Attempts that ended and were made again elsewhere, by reason.",
            ["reason"],
            registry=registry,
        )
        self.wakes = Counter(
            "penstock_wakes",
            "Roles scaled to zero that this router woke, by role.",
            ["role"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "penstock_prompt_tokens", "Prompt tokens of completions.", registry=registry
        )
        self.generation_tokens = Counter(
            "penstock_generation_tokens", "Tokens generated.", registry=registry
        )
        self.cached_tokens = Counter(
            "penstock_prompt_tokens_cached",
            "Prompt tokens whose KV was found in a cache.",
            registry=registry,
        )
        self.routed_tokens = Counter(
            "penstock_routed_tokens",
            "Prompt tokens routed, each attempt counted.",
            registry=registry,
        )
        self.predicted_hits = Counter(
            "penstock_routed_tokens_hit",
            "Of those, tokens that the prefix index expected in a cache.",
            registry=registry,
        )
        self._hit_ratio = Gauge(
            "penstock_prefix_hit_ratio",
            "Cached share of all prompt tokens since the start.",
            registry=registry,
        )
        self._waiting = Gauge(
            "penstock_queue_depth", "Completions without a first token.", registry=registry
        )
        self._running = Gauge(
            "penstock_running_requests", "Completions that are streaming.", registry=registry
        )
        self._index_blocks = Gauge(
            "penstock_prefix_index_blocks", "Different blocks in the index.", registry=registry
        )
        self._ready = Gauge("penstock_ready", "1 if /ready answers 200.", registry=registry)
        self._worker = {
            name: Gauge(f"penstock_worker_{name}", text, ["worker", "role"], registry=registry)
            for name, text in _WORKER_GAUGES.items()
        }
        self._prompt_total = 0
        self._cached_total = 0

    def routed(self, choice: Choice, demand: Demand) -> None:
        """Count one attempt that was sent to a worker."""
        self.routed_tokens.inc(demand.prompt_tokens)
        self.predicted_hits.inc(choice.cached_tokens)

    def finished(self, *, prompt: int, cached: int, generated: int) -> None:
        """Count the tokens of a completion that ended."""
        self._prompt_total += prompt
        self._cached_total += cached
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(cached)
        self.generation_tokens.inc(generated)

    def render(self, fleet: Fleet, *, waiting: int, running: int, ready: bool) -> bytes:
        """Return the exposition text with the gauges as they are now."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._ready.set(ready)
        self._index_blocks.set(len(fleet.index))
        self._hit_ratio.set(self._cached_total / self._prompt_total if self._prompt_total else 0.0)
        for gauge in self._worker.values():
            gauge.clear()
        for worker in fleet.workers:
            self._set_worker(worker, fleet)
        return generate_latest(self.registry)

    def _set_worker(self, worker: Worker, fleet: Fleet) -> None:
        values = {
            "ready": float(worker.ready),
            "calls": float(len(worker.calls)),
            "indexed_blocks": float(fleet.index.blocks_of(worker.name)),
        }
        load = worker.load
        if load is not None:
            values |= {
                "running": float(load.running),
                "waiting": float(load.waiting),
                "queued_tokens": float(load.queued_tokens),
                "queued_seconds": load.queued_seconds,
                "kv_pages_free": float(load.pages_free),
                "kv_pages_total": float(load.pages_total),
                "step_seconds": load.step_seconds,
            }
        for name, value in values.items():
            self._worker[name].labels(worker.name, worker.endpoint.role).set(value)


_WORKER_GAUGES = {
    "ready": "1 if the worker takes new work.",
    "calls": "Requests that this router has at the worker.",
    "indexed_blocks": "Blocks that the prefix index knows on the worker.",
    "running": "Requests running, as the worker published.",
    "waiting": "Requests waiting, as the worker published.",
    "queued_tokens": "Prompt tokens that wait for prefill, as the worker published.",
    "queued_seconds": "Predicted queue of a new prompt, as the worker published.",
    "kv_pages_free": "KV pages free or cached, as the worker published.",
    "kv_pages_total": "KV pages, as the worker published.",
    "step_seconds": "Recent time of one decode step, as the worker published.",
}
