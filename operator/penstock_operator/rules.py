"""What must hold between the values of a manifest, each said twice: in Python and in CEL.

Python is what `penstock` and the operator check, CEL what the API server checks; both refuse with
the same sentence. This list is the one place of such rules: `loader` applies it, `crds` puts it
into the schemas, and a test asks a real API server whether the two agree.

Ranges, patterns and choices of a single field are not here: they are part of its type in `api`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

from penstock_operator import api, scaler
from penstock_operator.errors import Problem
from penstock_operator.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_NAME = 40
"""Longest service name: names and hashes that objects add must fit into a label of 63."""

Check: TypeAlias = "Callable[[Any], bool]"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that holds for every accepted part.

    Attributes:
        holds: the check in Python, of the pydantic model.
        cel: the same in CEL; `self` is the part, with all defaults put in.
        message: the sentence of the refusal.
        field: what is wrong in it, dotted, as far as one field can be blamed.
    """

    holds: Check
    cel: str
    message: str
    field: str = ""


def _matching(
    field: str, pattern: str, message: str, *, where: str = "", optional: bool = False
) -> Rule:
    """Return the rule that a text has this form, in the part of RE2 that Python has too.

    With `where`, only texts with this beginning; with `optional`, only where there is one.
    """
    compiled = re.compile(pattern.replace("$", r"\Z"))  # Python's $ passes over a line's end

    def holds(part: Any) -> bool:
        value: str | None = getattr(part, field)
        if value is None or not value.startswith(where):
            return True
        return compiled.search(value) is not None

    cel = f"self.{field}.matches(r'{pattern}')"
    if where:
        cel = f"!self.{field}.startsWith('{where}') || {cel}"
    if optional:
        cel = f"!has(self.{field}) || {cel}"
    return Rule(holds, cel, message, field)


def _amount(field: str) -> Rule:
    """Return the rule that a quantity, if there is one, is one of more than nothing."""

    def holds(part: Any) -> bool:
        value = getattr(part, field)
        if value is None:
            return True
        try:
            return parse_quantity(value) > 0
        except ValueError:
            return False

    text = f"string(self.{field})"
    cel = f"isQuantity({text}) && quantity({text}).isGreaterThan(quantity('0'))"
    return Rule(
        holds,
        f"!has(self.{field}) || {cel}",
        "must be a quantity of more than 0, such as 500m, 2, 16Gi or 1.5G",
        field,
    )


_MODEL = (
    _matching(
        "uri",
        "^(file|hf|pvc|s3|oci)://",
        "a model's URI begins with one of file://, hf://, pvc://, s3://, oci://",
    ),
    _matching(
        "uri",
        "^file:///[^?#]*[^/?#][^?#]*$",
        "a file:// URI holds the absolute path of a directory: file:///PATH, with three slashes",
        where="file://",
    ),
    _matching(
        "uri",
        "^hf://[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$",
        "an hf:// URI is hf://ORG/NAME; branch, tag or commit are given in revision",
        where="hf://",
    ),
    _matching(
        "uri",
        "^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^?#]*)?$",
        "a pvc:// URI is pvc://CLAIM/PATH, or pvc://CLAIM for all of the volume",
        where="pvc://",
    ),
    _matching(
        "uri",
        "^s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/[^?#]*)?$",
        "an s3:// URI is s3://BUCKET/PREFIX, or s3://BUCKET for all of the bucket",
        where="s3://",
    ),
    _matching(
        "uri",
        "^oci://[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
        "an oci:// URI is oci://IMAGE, such as oci://registry.example/models/qwen3:1",
        where="oci://",
    ),
    Rule(
        lambda model: re.search("/[.][.](/|$)", model.uri) is None,
        "!self.uri.matches('/[.][.](/|$)')",
        "a model's URI has no '..' in its path",
        "uri",
    ),
    Rule(
        lambda model: model.revision is None or model.scheme == "hf",
        "!has(self.revision) || self.uri.startsWith('hf://')",
        "revision applies to hf:// repositories only",
        "revision",
    ),
    Rule(
        lambda model: model.token_secret is None or model.scheme in ("hf", "s3"),
        "!has(self.tokenSecret) || self.uri.matches('^(hf|s3)://')",
        "tokenSecret applies to hf:// and s3:// models only",
        "tokenSecret",
    ),
    Rule(
        lambda model: model.s3 is None or model.scheme == "s3",
        "!has(self.s3) || self.uri.startsWith('s3://')",
        "s3 applies to s3:// models only",
        "s3",
    ),
)

_REPLICAS = Rule(
    lambda role: role.replicas is None or role.autoscaling is None,
    "!has(self.replicas) || !has(self.autoscaling)",
    "replicas and autoscaling exclude each other: keep one",
)

_GPU_EACH_RANK = Rule(
    lambda role: role.resources.gpu == 0 or role.resources.gpu >= role.tensor_parallel,
    "self.resources.gpu == 0 || self.resources.gpu >= self.tensorParallel",
    "every rank of tensorParallel computes on a GPU of its own: ask for as many in resources.gpu",
    "resources.gpu",
)

_NEEDS_GPU = "workers compute on cuda, which needs at least 1 GPU each"
_SPEC = (
    Rule(
        lambda spec: spec.computes_on == "cpu" or spec.decode.resources.gpu > 0,
        "self.decode.resources.gpu > 0 || (has(self.device) ? self.device == 'cpu' : "
        "!has(self.prefill) || self.prefill.resources.gpu == 0)",
        _NEEDS_GPU,
        "decode.resources.gpu",
    ),
    Rule(
        lambda spec: (
            spec.computes_on == "cpu" or spec.prefill is None or spec.prefill.resources.gpu > 0
        ),
        "!has(self.prefill) || self.prefill.resources.gpu > 0 || (has(self.device) ? "
        "self.device == 'cpu' : self.decode.resources.gpu == 0)",
        _NEEDS_GPU,
        "prefill.resources.gpu",
    ),
)

_NAME = (
    Rule(
        lambda service: len(service.name) <= MAX_NAME,
        f"self.metadata.name.size() <= {MAX_NAME}",
        f"the name has at most {MAX_NAME} characters: names of pods add to it, and labels end at "
        "63",
        "metadata.name",
    ),
    Rule(
        lambda service: re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", service.name) is not None,
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "the name has lower-case letters, digits and '-', and begins with a letter: it becomes "
        "part of host names",
        "metadata.name",
    ),
)

RULES: dict[type[BaseModel], tuple[Rule, ...]] = {
    api.InferenceService: _NAME,
    api.Spec: _SPEC,
    api.Model: _MODEL,
    api.S3: (
        _matching(
            "endpoint",
            "^https?://[^/?#]+/?$",
            "the endpoint is a URL without a path, such as https://minio.storage.svc:9000",
            optional=True,
        ),
    ),
    api.Rdma: (
        _matching(
            "resource", "^[^/]+/[^/]+$", "an extended resource is DOMAIN/NAME, such as rdma/ib"
        ),
    ),
    api.Resources: (_amount("cpu"), _amount("memory")),
    api.KvCache: (_amount("memory"),),
    api.Autoscaling: (
        Rule(
            lambda bounds: bounds.min_replicas <= bounds.max_replicas,
            "self.minReplicas <= self.maxReplicas",
            "minReplicas is more than maxReplicas",
            "minReplicas",
        ),
    ),
    api.RoleSpec: (_REPLICAS,),
    api.Prefill: (
        _GPU_EACH_RANK,
        Rule(
            lambda prefill: (
                prefill.layers_per_stage is None
                or len(prefill.layers_per_stage) == prefill.pipeline_parallel
            ),
            "!has(self.layersPerStage) || self.layersPerStage.size() == self.pipelineParallel",
            "layersPerStage has one number for each of the pipelineParallel stages",
            "layersPerStage",
        ),
        # No `multipleOf` in the schema: the API server takes a fraction there for 0.
        Rule(
            lambda prefill: all(count * 2 % 1 == 0 for count in prefill.layers_per_stage or ()),
            "!has(self.layersPerStage) || "
            "self.layersPerStage.all(count, count * 2.0 == double(int(count * 2.0)))",
            "layersPerStage counts layers and halves of layers, such as 8 or 8.5",
            "layersPerStage",
        ),
    ),
    api.Decode: (_GPU_EACH_RANK,),
    api.Router: (
        Rule(
            lambda router: router.autoscaling is None or router.autoscaling.min_replicas > 0,
            "!has(self.autoscaling) || self.autoscaling.minReplicas > 0",
            "the router cannot be scaled to zero: it is what holds requests and wakes the others",
            "autoscaling.minReplicas",
        ),
    ),
    scaler.RoleScaler: (
        Rule(
            lambda found: found.metadata.name == f"{found.spec.service}-{found.spec.role}",
            "self.metadata.name == self.spec.service + '-' + self.spec.role",
            "a RoleScaler is named SERVICE-ROLE, as it says in its spec",
            "metadata.name",
        ),
    ),
}


def rules_of(model: type[BaseModel]) -> list[Rule]:
    """Return the rules of a model and of those that it extends."""
    return [rule for base in model.__mro__ for rule in RULES.get(base, ())]


def broken(part: BaseModel, path: str = "") -> Iterator[Problem]:
    """Give a problem for every rule that `part`, or a part of it, breaks."""
    for rule in rules_of(type(part)):
        if not rule.holds(part):
            yield Problem(_join(path, rule.field), rule.message)
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from broken(value, _join(path, field.alias or name))


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path and field else path or field
