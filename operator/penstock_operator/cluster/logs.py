"""Log lines: one JSON object each, or text for a person. They name the service they are about."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

SERVICE: ContextVar[str] = ContextVar("service", default="")
"""NAMESPACE/NAME of the service that is worked on, for every line that is logged meanwhile."""


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message; service and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if SERVICE.get():
            line["service"] = SERVICE.get()
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Time, level, service, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = super().format(record)
        return f"{text} [{SERVICE.get()}]" if SERVICE.get() else text


def set_up(*, style: str, level: str) -> None:
    """Send all logs to stderr. `style` is json or text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        # Each connection lost and found again is news of the framework's, not of a service.
        logging.getLogger("kopf").setLevel(logging.WARNING)
