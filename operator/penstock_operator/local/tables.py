"""Status and pods as the tables, documents and lines that commands print. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock_operator.loader import dump_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from penstock_operator.api import InferenceService, Status

GET_COLUMNS = ("NAME", "MODEL", "READY", "REASON", "PREFILL", "DECODE", "ROUTER", "URL", "AGE")
WIDE_COLUMNS = ("MESSAGE", "REVISION", "TRANSPORT")
PS_COLUMNS = ("NAME", "ROLE", "GROUP", "STAGE", "PID", "ADDRESS", "STATE", "RESTARTS", "MESSAGE")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows below their headings, aligned, columns three spaces apart, as kubectl does."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def get_row(
    service: InferenceService, status: Status | None, age: str, *, wide: bool
) -> tuple[str, ...]:
    """Return the columns of `penstock get` for one service."""
    model = service.spec.model.served_name
    if status is None:
        row = (service.name, model, "Unknown", "Starting", "-", "-", "-", "-", age)
        return (*row, "", "", "") if wide else row
    ready = status.condition("Ready")
    row = (
        service.name,
        model,
        ready.status,
        ready.reason,
        status.prefill.summary if status.prefill else "-",
        status.decode.summary,
        status.router.summary,
        status.url,
        age,
    )
    return (*row, ready.message, status.decode.revision, status.transport) if wide else row


def ps_row(pod: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns of `penstock ps` for one pod, as `describe_pod` gives it."""
    state = str(pod["state"])
    if state == "starting" and pod["progress"]:
        state = f"starting {pod['progress']:.0%}"
    return (
        pod["name"],
        pod["role"],
        pod["group"] or "-",
        "-" if pod["stage"] is None else str(pod["stage"]),
        "-" if pod["pid"] is None else str(pod["pid"]),
        pod["address"],
        state,
        str(pod["restarts"]),
        pod["message"],
    )


def document(service: InferenceService, status: Status | None) -> dict[str, Any]:
    """Return the resource with its status, as `kubectl get -o json` would."""
    found = dump_manifest(service)
    if status is not None:
        found["status"] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return found


def describe(
    service: InferenceService, status: Status | None, pods: list[dict[str, Any]], age: str
) -> str:
    """Return everything known about a service, for a person."""
    facts = [
        ("Name", service.name),
        ("Model", f"{service.spec.model.served_name} ({service.spec.model.uri})"),
        ("Age", age),
    ]
    if status is not None:
        facts += [("URL", status.url), ("Transport", status.transport or "not reported")]
    lines = [f"{name + ':':<12}{value}" for name, value in facts]
    if status is not None:
        rows = [
            (c.type, c.status, c.reason, f"{c.last_transition_time:%H:%M:%S}", c.message)
            for c in status.conditions
        ]
        lines += ["", table(("CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"), rows)]
    return "\n".join([*lines, "", table(PS_COLUMNS, map(ps_row, pods))])


def age_text(since: datetime, now: datetime) -> str:
    """Return a time span as kubectl shows it: 45s, 12m, 3h, 2d."""
    seconds = max(0, int((now - since).total_seconds()))
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86400}d"


def example_request(url: str, model: str, key_file: Path | None) -> str:
    """Return a curl command that a person can paste."""
    bearer = f'  -H "Authorization: Bearer $(cat {key_file})" \\\n' if key_file else ""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n{bearer}"
        f'  -d \'{{"model": "{model}", "stream": true, '
        '"messages": [{"role": "user", "content": "Hello"}]}\''
    )
