"""A worker's Prometheus metrics, made from its /state at every scrape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from penstock_runtime.worker.settings import WorkerSettings

_COUNTERS = {
    "steps": ("penstock_steps", "Steps computed."),
    "tokens": ("penstock_worker_tokens", "Decode: tokens generated. Prefill: tokens computed."),
    "requests": ("penstock_worker_requests", "Requests taken."),
    "remote_prefills": ("penstock_remote_prefills", "Prompts sent to a prefill group."),
    "remote_cuts": ("penstock_remote_prefill_cuts", "Grants that ended early."),
    "fences": ("penstock_fences", "Receiving agents destroyed to stop a peer's writes."),
    "preemptions": ("penstock_preemptions", "Requests that gave their KV back to older ones."),
    "compute_seconds": ("penstock_compute_seconds", "Time spent computing steps."),
    "wait_seconds": (
        "penstock_bubble_seconds",
        "Time a stage had a plan and waited for activations or pages.",
    ),
    "exposed_transfer_seconds": (
        "penstock_kv_transfer_exposed_seconds",
        "Time between the end of a prompt's last chunk and the arrival of its KV.",
    ),
    "kv_bytes_written": ("penstock_kv_bytes_written", "KV bytes written to decode workers."),
    "kv_bytes_read": ("penstock_kv_bytes_read", "KV bytes read back from decode workers."),
    "busy_seconds": ("penstock_compute_thread_seconds", "Time the compute thread was busy."),
}


class WorkerCollector(Collector):
    """Exports what `describe` says: page counts by state, counters, epoch, cost models."""

    def __init__(
        self, settings: WorkerSettings, describe: Callable[[], Mapping[str, object]]
    ) -> None:
        self._settings = settings
        self._describe = describe

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as of now."""
        state = self._describe()
        info = GaugeMetricFamily(
            "penstock_worker_info", "Who this is.", labels=["role", "name", "group", "stage"]
        )
        s = self._settings
        info.add_metric([s.role, s.name, s.group, str(s.stage)], 1)
        yield info
        for key, (name, text) in _COUNTERS.items():
            value = state.get(key)
            if isinstance(value, int | float):
                yield CounterMetricFamily(name, text, value=value)
        yield from self._pages(state)
        yield from self._costs(state)
        epoch = state.get("epoch")
        if isinstance(epoch, int):
            yield GaugeMetricFamily("penstock_group_epoch", "Epoch of the group.", value=epoch)

    @staticmethod
    def _pages(state: Mapping[str, object]) -> Iterator[Metric]:
        pages = state.get("pages")
        if isinstance(pages, dict):
            family = GaugeMetricFamily("penstock_kv_pages", "KV pages by state.", labels=["state"])
            for name, count in pages.items():
                family.add_metric([name], count)
            yield family

    @staticmethod
    def _costs(state: Mapping[str, object]) -> Iterator[Metric]:
        costs = state.get("costs")
        if isinstance(costs, list):
            family = GaugeMetricFamily(
                "penstock_stage_cost",
                "Coefficients of t(L, x) = c + gamma L + b x + a (2 L x + x²), and their error.",
                labels=["stage", "coefficient"],
            )
            for stage, cost in enumerate(costs):
                for name, value in cost.items():
                    family.add_metric([str(stage), name], value)
            yield family
