"""Cost coefficients from a command line, a file, or a group that runs."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.simulator.hardware import StageModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_STAGES = 1024
_TIMEOUT_SECONDS = 5.0
_STATE_BYTES = 4 * 1024 * 1024
_METRIC = re.compile(r"^penstock_stage_cost\{([^}]*)\}\s+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

_Coefficient = Annotated[float, Meta(ge=0)]


class CostsUnknown(Exception):  # noqa: N818 - it names the event
    """No coefficients where they were looked for. The message says what was expected there."""


class _Coefficients(Struct):
    """As in /state; `error` is there and is not used."""

    c: _Coefficient
    b: _Coefficient
    a: _Coefficient = 0.0
    gamma: _Coefficient = 0.0
    saturation: _Coefficient = 0.0

    def model(self) -> StageModel:
        return StageModel(Cost(self.c, self.gamma, self.b, self.a), self.saturation)


class _State(Struct):
    costs: list[_Coefficients]
    layers_per_stage: list[float] = []


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a group's stages."""

    models: list[StageModel]
    layers: list[float]
    """Of each stage; none if nobody says, or if some stages are away."""


def from_text(text: str) -> StageModel:
    """Read "c=0.01,b=2e-5,a=1e-10". Raises CostsUnknown."""
    pairs = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    try:
        return msgspec.convert(pairs, _Coefficients, strict=False).model()
    except (msgspec.ValidationError, ValueError) as error:
        raise CostsUnknown(
            f"{text!r} is not c=SECONDS,b=SECONDS with, if wanted, a=, gamma= and saturation=: "
            f"{error}"
        ) from error


def from_file(path: Path) -> Measured:
    """Read a JSON object of coefficients, or a list of one for each stage; or a /state.

    Raises CostsUnknown.
    """
    try:
        return _from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CostsUnknown(f"cannot read {path}: {error.strerror}") from error


def from_worker(address: str) -> Measured:
    """Ask stage 0 of a running group, at http://host:port, or its /state or /metrics.

    Raises CostsUnknown.
    """
    url = address if urlsplit(address).path.strip("/") else address.rstrip("/") + "/state"
    data = fetch(url, limit=_STATE_BYTES)
    if urlsplit(url).path.endswith("/metrics"):
        return _from_metrics(data.decode(errors="replace"), url)
    return _from_json(data, url)


def fetch(url: str, *, limit: int) -> bytes:
    """Return the body of an HTTP answer. Raises CostsUnknown, also if it is larger than `limit`."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise CostsUnknown(f"{url!r} is not an http:// address of a worker")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - above
            data: bytes = answer.read(limit + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CostsUnknown(f"no answer from {url}: {error}") from error
    if len(data) > limit:
        raise CostsUnknown(f"{url} answers with more than {limit} bytes")
    return data


def _from_json(data: bytes, where: str) -> Measured:
    layers: list[float] = []
    try:
        loaded = json.loads(data)
        if isinstance(loaded, dict) and "costs" in loaded:
            state = msgspec.convert(loaded, _State)
            found, layers = state.costs, state.layers_per_stage
        elif isinstance(loaded, list):
            found = msgspec.convert(loaded, list[_Coefficients])
        else:
            found = [msgspec.convert(loaded, _Coefficients)]
    except (ValueError, msgspec.ValidationError) as error:
        raise CostsUnknown(
            f"{where} has no cost coefficients (c, b, a, gamma of each stage): {error}; "
            "only stage 0 of a group knows them"
        ) from error
    if not 1 <= len(found) <= MAX_STAGES:
        raise CostsUnknown(f"{where} describes {len(found)} stages, not 1 to {MAX_STAGES}")
    known = layers if len(layers) == len(found) else []
    return Measured([entry.model() for entry in found], known)


def _from_metrics(text: str, where: str) -> Measured:
    stages: dict[int, dict[str, float]] = {}
    for labels, value in _METRIC.findall(text):
        named = dict(_LABEL.findall(labels))
        try:
            stages.setdefault(int(named["stage"]), {})[named["coefficient"]] = float(value)
        except (KeyError, ValueError) as error:
            raise CostsUnknown(f"{where}: strange metric {labels!r}: {error}") from error
    ordered = [stages[stage] for stage in sorted(stages)]
    return _from_json(json.dumps({"costs": ordered}).encode(), where)


def for_stages(models: Sequence[StageModel], stages: int | None) -> tuple[StageModel, ...]:
    """Return a model for each stage: one stands for all. Raises CostsUnknown if they do not fit."""
    if stages is None or len(models) == stages:
        return tuple(models)
    if len(models) == 1:
        return tuple(models) * stages
    raise CostsUnknown(f"coefficients of {len(models)} stages do not describe {stages}")
