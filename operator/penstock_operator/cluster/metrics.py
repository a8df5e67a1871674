"""What the operator measures of itself, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from collections.abc import Callable


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.reconcile_seconds = Histogram(
            "penstock_operator_reconcile_seconds",
            "Duration of one reconcile of one service, failed ones too.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "penstock_operator_reconcile_errors_total",
            "Reconciles that failed, by the kind of error.",
            ["kind"],
            registry=self.registry,
        )
        self.last_success = Gauge(
            "penstock_operator_last_success_timestamp_seconds",
            "When a reconcile last succeeded, in seconds since 1970.",
            registry=self.registry,
        )
        self.api_calls = Counter(
            "penstock_operator_api_calls_total",
            "Requests to the API server, by verb, resource and HTTP status (0: no answer). "
            "Watches and the lists that begin them are not among them.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.api_seconds = Histogram(
            "penstock_operator_api_call_seconds",
            "Duration of requests to the API server, by verb.",
            ["verb"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 20),
            registry=self.registry,
        )
        self.events_failed = Counter(
            "penstock_operator_events_failed_total",
            "Events that could not be posted.",
            registry=self.registry,
        )
        self.watch_repairs = Counter(
            "penstock_operator_watch_repairs_total",
            "Objects of which a watch had not told, found by comparing with a LIST.",
            ["resource"],
            registry=self.registry,
        )
        self.queue_depth = self._gauge("queue_depth", "Services that wait for their reconcile.")
        self.queue_age = self._gauge(
            "queue_age_seconds", "Longest that a service has waited for, or is in, its reconcile."
        )
        self.services = self._gauge("services", "Services that are known.")
        self.children = self._gauge("children", "Objects of services that are known.")
        self.leader = self._gauge("leader", "1 if this process leads, 0 if it stands by.")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"penstock_operator_{name}", text, registry=self.registry)

    def follow(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Have a gauge tell what `value` returns whenever it is read."""
        gauge.set_function(value)

    def render(self) -> bytes:
        """Return the text for Prometheus."""
        return generate_latest(self.registry)
