"""YAML text to an `InferenceService`, or every reason why not, with path and line."""

from __future__ import annotations

import difflib
import typing
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from pydantic import BaseModel, ValidationError

from penstock_operator.api import API_VERSION, KIND, InferenceService
from penstock_operator.errors import ManifestError, Problem
from penstock_operator.rules import broken

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Path: TypeAlias = tuple[str | int, ...]
MAX_BYTES = 1024 * 1024
"""Largest manifest, as etcd has it."""


def load_manifest(text: str, *, source: str = "") -> InferenceService:
    """Return the service that YAML (or JSON) `text` describes.

    Raises ManifestError with all problems found; `source` (a file's name) is named in it.
    """
    if len(text.encode()) > MAX_BYTES:
        raise ManifestError([Problem("", f"it has more than {MAX_BYTES} bytes")], source=source)
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node]
        if len(nodes) != 1:
            reason = f"it holds {len(nodes)} YAML documents; one {KIND} is expected"
            raise ManifestError([Problem("", reason)], source=source)
        lines, problems = _lines(nodes[0])
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ManifestError([_syntax_problem(error)], source=source) from error
    if problems:
        raise ManifestError(problems, source=source)
    return parse_manifest(raw, source=source, lines=lines)


def parse_manifest(
    raw: object, *, source: str = "", lines: dict[Path, int] | None = None
) -> InferenceService:
    """Return the service that plain data describes. Raises ManifestError."""
    lines = lines or {}
    if not isinstance(raw, dict):
        raise ManifestError([Problem("", "it is not a map of fields")], source=source)
    kind, version = raw.get("kind"), raw.get("apiVersion")
    if kind != KIND or version != API_VERSION:
        reason = f"it is {version} {kind}; expected apiVersion: {API_VERSION} and kind: {KIND}"
        raise ManifestError([Problem("", reason)], source=source)
    try:
        service = InferenceService.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(details, lines) for details in error.errors(include_url=False)]
        raise ManifestError(problems, source=source) from error
    problems = [_located(problem, lines) for problem in broken(service)]
    if problems:
        raise ManifestError(problems, source=source)
    return service


def dump_manifest(service: InferenceService) -> dict[str, Any]:
    """Return the service as plain data; `parse_manifest` gives an equal service back."""
    return service.model_dump(mode="json", by_alias=True, exclude_none=True)


def _syntax_problem(error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or "it is nested too deeply or not YAML"
    return Problem("", f"it is not YAML: {reason}", mark.line + 1 if mark else 0)


def _lines(root: yaml.Node) -> tuple[dict[Path, int], list[Problem]]:
    """Return the line of every field, and fields that are given twice."""
    lines: dict[Path, int] = {}
    problems: list[Problem] = []
    open_nodes: list[tuple[Path, yaml.Node]] = [((), root)]
    while open_nodes:
        path, node = open_nodes.pop()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                child = (*path, str(key.value))
                line = key.start_mark.line + 1
                if child in lines and key.value != "<<":
                    problems.append(Problem(_dotted(child), "given twice; keep one", line))
                lines[child] = line
                open_nodes.append((child, value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[*path, index] = value.start_mark.line + 1
                open_nodes.append(((*path, index), value))
    return lines, problems


def _problem(details: ErrorDetails, lines: dict[Path, int]) -> Problem:
    path: Path = tuple(details["loc"])
    match details["type"]:
        case "extra_forbidden":
            reason = "unknown field" + _suggestion(path)
        case "missing":
            reason = "required, but not given"
        case "value_error":
            reason = str(details["ctx"]["error"])
        case "literal_error":
            reason = f"{details['input']!r} is not one of {details['ctx']['expected']}"
        case _:
            reason = f"{details['msg'][:1].lower()}{details['msg'][1:]}, not {details['input']!r}"
    return Problem(_dotted(path), reason, _line(path, lines))


def _located(problem: Problem, lines: dict[Path, int]) -> Problem:
    """Return the problem of a rule with its line."""
    line = _line(tuple(problem.path.split(".")), lines)
    return Problem(problem.path, problem.reason, line)


def _line(path: Path, lines: dict[Path, int]) -> int:
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return 0


def _suggestion(path: Path) -> str:
    known = _fields_at(path[:-1])
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(sorted(known))}" if known else ""


def _fields_at(path: Path) -> list[str]:
    """Return the names of the fields that the part at `path` may have."""
    model: type[BaseModel] = InferenceService
    for part in path:
        by_alias = {field.alias or name: field for name, field in model.model_fields.items()}
        field = by_alias.get(str(part))
        inner = _model_of(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: object) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
