"""The chart against the code: rights, metrics, values. Rendering it is e2e/test_chart.py's part."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from penstock_operator.cluster import rbac
from penstock_operator.cluster.metrics import Metrics as OperatorMetrics
from penstock_operator.cluster.settings import Settings as OperatorSettings
from penstock_router.metrics import Metrics
from penstock_runtime.worker import metrics as worker_metrics

CHART = Path(__file__).parents[3] / "charts" / "penstock"
POD_LABELS = {"penstock_dev_service", "penstock_dev_role", "penstock_dev_group"}
"""What the chart's PodMonitor adds to the series."""


class _Settings:
    role, name, group, stage = "decode", "d0", "", 0


def names_of(registry: CollectorRegistry) -> set[str]:
    """Every name that a scrape of `registry` may hold."""
    found: set[str] = set()
    for family in registry.collect():
        found |= {f"{family.name}{suffix}" for suffix in _SUFFIXES[family.type]}
    return found


_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}


def existing() -> set[str]:
    """The names of all metrics that the three planes export."""
    state: dict[str, object] = dict.fromkeys(worker_metrics._COUNTERS, 1.0)
    state |= {"pages": {"free": 1}, "costs": [{"c": 1.0}], "epoch": 1}
    worker = CollectorRegistry()
    worker.register(worker_metrics.WorkerCollector(_Settings(), lambda: state))  # type: ignore[arg-type]
    registries = (worker, Metrics().registry, OperatorMetrics().registry)
    return set().union(*map(names_of, registries))


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bpenstock_\w+", expression)) - POD_LABELS


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def test_the_dashboard_shows_metrics_that_exist() -> None:
    board = dashboard()
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    queries = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    used = set().union(*map(named, [*expressions, *queries]))
    assert used <= existing(), used - existing()
    assert len(used) > 30
    assert all(panel["description"] for panel in panels)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_watch_metrics_that_exist() -> None:
    rules = alerts()
    used = set().union(*(named(rule["expr"]) for rule in rules))
    assert used <= existing(), used - existing()
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_the_operator_has_exactly_the_rights_that_its_code_lists() -> None:
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    assert rules == {
        "served": [rule.manifest() for rule in rbac.CLUSTER_RULES],
        "own": [rule.manifest() for rule in rbac.LEASE_RULES],
    }


def test_every_value_has_a_schema_and_the_schema_knows_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref", "")
        found: dict[str, Any] = (
            schema["definitions"][reference.rpartition("/")[2]] if reference else node
        )
        return found

    def compare(node: dict[str, Any], value: Any, path: str) -> None:
        node = resolve(node)
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        known = set(node["properties"]) - {"global"}  # Helm's own
        assert isinstance(value, dict), path
        # What is optional may have no default, but nothing has a default without a schema.
        assert set(value) == known, f"{path}: {set(value) ^ known}"
        for name, part in value.items():
            compare(node["properties"][name], part, f"{path}.{name}")

    compare(schema, values(), "values")


def test_the_chart_has_the_version_of_the_package() -> None:
    import tomllib

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == chart["version"] == project["version"]


def test_the_operator_knows_the_flags_that_it_is_given() -> None:
    template = (CHART / "templates" / "deployment.yaml").read_text()
    given = set(re.findall(r"- --([a-z-]+)=", template))
    known = {field.name.replace("_", "-") for field in dataclasses.fields(OperatorSettings)}
    assert given
    assert given <= known
