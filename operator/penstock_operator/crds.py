"""The CustomResourceDefinitions, made from the pydantic models and the rules. Pure.

pydantic's JSON schema is turned into a structural schema as Kubernetes wants it: references put in
place, optional fields not required and without `default: null`, unknown fields dropped instead of
refused, quantities as int-or-string, and a part with defaults inside has them as its own default,
without which they would not be filled in. Whole, not `{}`: rules are evaluated on the default too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import yaml
from pydantic import BaseModel

from penstock_operator.api import InferenceService, Observed
from penstock_operator.rules import rules_of
from penstock_operator.scaler import RoleScaler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock_operator.rules import Rule

Schema: TypeAlias = dict[str, Any]

GROUP = "penstock.dev"
VERSION = "v1alpha1"

_KEPT = (
    "type",
    "format",
    "enum",
    "pattern",
    "maxLength",
    "minLength",
    "minimum",
    "maximum",
)
_KEPT_OF_LISTS = ("minItems", "maxItems")
_ATOMIC: Schema = {"x-kubernetes-list-type": "atomic"}
_LISTS: dict[str, Schema] = {
    "conditions": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
}
_NUMBER_OR_TEXT: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "x-kubernetes-int-or-string": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """What a CRD says beside its schema."""

    model: type[BaseModel]
    plural: str
    short_names: tuple[str, ...]
    columns: tuple[Schema, ...]
    scale: Schema | None = None


def _column(name: str, path: str, *, kind: str = "string", wide: bool = False) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": 1} if wide else column


def _condition(field: str) -> str:
    return f'.status.conditions[?(@.type=="Ready")].{field}'


DEFINITIONS = {
    "inferenceservices": Definition(
        model=InferenceService,
        plural="inferenceservices",
        short_names=("isvc",),
        columns=(
            _column("Model", ".status.model"),
            _column("Ready", _condition("status")),
            _column("Reason", _condition("reason")),
            _column("Prefill", ".status.prefill.summary"),
            _column("Decode", ".status.decode.summary"),
            _column("Router", ".status.router.summary"),
            _column("URL", ".status.url"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Message", _condition("message"), wide=True),
            _column("Revision", ".status.decode.revision", wide=True),
            _column("Transport", ".status.transport", wide=True),
        ),
    ),
    "rolescalers": Definition(
        model=RoleScaler,
        plural="rolescalers",
        short_names=("rsc",),
        columns=(
            _column("Service", ".spec.service"),
            _column("Role", ".spec.role"),
            _column("Wanted", ".spec.replicas", kind="integer"),
            _column("Running", ".status.replicas", kind="integer"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
        ),
        scale={
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    ),
}


def definition(plural: str) -> Schema:
    """Return the CRD of a resource, as the API server takes it. Raises KeyError."""
    found = DEFINITIONS[plural]
    kind = found.model.__name__
    subresources: Schema = {"status": {}}
    if found.scale is not None:
        subresources["scale"] = dict(found.scale)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": list(found.short_names),
                "categories": ["penstock"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [dict(column) for column in found.columns],
                    "schema": {"openAPIV3Schema": _root(found.model)},
                }
            ],
        },
    }


def crd_text(plural: str) -> str:
    """Return the CRD as YAML, as it is committed."""
    head = f"# Made by `penstock crds {plural}` from operator/penstock_operator/api.py.\n"
    return head + yaml.dump(
        definition(plural), Dumper=_PlainDumper, sort_keys=False, width=100, allow_unicode=True
    )


class _PlainDumper(yaml.SafeDumper):
    """Writes every value where it stands: the API server knows no YAML anchors."""

    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


# --- schema -----------------------------------------------------------------------------------


def _root(model: type[BaseModel]) -> Schema:
    """Return the schema of a resource; its metadata is the API server's own."""
    plain = model.model_json_schema()
    models = {found.__name__: found for found in _models(model)}
    schema = _Structural(plain.get("$defs", {}), models).part(model.__name__, plain)
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    schema["required"] = ["spec"]
    return schema


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Give a model and all models below it."""
    yield model
    for field in model.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _models(inner)


class _Structural:
    """Turns pydantic's JSON schema into a structural one."""

    def __init__(self, definitions: Schema, models: dict[str, type[BaseModel]]) -> None:
        self._definitions = definitions
        self._models = models

    def part(self, name: str, plain: Schema) -> Schema:
        """Return the schema of a model."""
        model = self._models[name]
        properties = {
            field: self.value(field, value) for field, value in plain["properties"].items()
        }
        if issubclass(model, Observed):  # what nobody has written was not observed
            for value in properties.values():
                value.pop("default", None)
        schema: Schema = {
            "description": _sentence(plain.get("description", "")),
            "type": "object",
            "properties": properties,
        }
        if plain.get("required"):
            schema["required"] = list(plain["required"])
        rules = rules_of(model)
        if rules:
            schema["x-kubernetes-validations"] = [_validation(rule) for rule in rules]
        return schema

    def value(self, path: str, plain: Schema) -> Schema:
        """Return the schema of a field: what it is, and its description and default."""
        schema: Schema = {}
        if "description" in plain:
            schema["description"] = _sentence(plain["description"])
        shape = self._shape(path, plain)
        default = _default(plain, shape)
        if default is not None:
            schema["default"] = default
        return schema | {key: value for key, value in shape.items() if key not in schema}

    def _shape(self, path: str, plain: Schema) -> Schema:
        if "$ref" in plain:
            name = plain["$ref"].rpartition("/")[2]
            return self.part(name, self._definitions[name])
        if "anyOf" in plain:
            return self._union(path, [part for part in plain["anyOf"] if part != {"type": "null"}])
        if "const" in plain:
            return {"type": "string", "enum": [plain["const"]]}
        if plain.get("type") == "array":
            limits = {key: plain[key] for key in _KEPT_OF_LISTS if key in plain}
            return {"type": "array", **limits, **_LISTS.get(path, _ATOMIC)} | {
                "items": self.value(path, plain["items"])
            }
        if plain.get("type") == "object" and plain.get("additionalProperties") is True:
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        if "type" not in plain:
            raise ValueError(f"{path} has no type that a structural schema can have: {plain}")
        return {key: plain[key] for key in _KEPT if key in plain}

    def _union(self, path: str, parts: list[Schema]) -> Schema:
        """An optional field is its one type; beside that only a number or a text can be said."""
        if len(parts) == 1:
            return self._shape(path, parts[0])
        if {part.get("type") for part in parts} == {"integer", "string"}:
            return copy.deepcopy(_NUMBER_OR_TEXT)
        raise ValueError(f"{path} is a union that a structural schema cannot have: {parts}")


def _default(plain: Schema, shape: Schema) -> Any:
    """Return the default to be stored, None for none.

    An empty list or map says nothing, so it is left out.
    """
    default = plain.get("default")
    if default is not None and "properties" in shape:
        fields = shape["properties"].items()
        default = {name: inner["default"] for name, inner in fields if "default" in inner}
    return None if default in (None, "", [], {}) else copy.deepcopy(default)


def _validation(rule: Rule) -> Schema:
    validation: Schema = {"rule": rule.cel, "message": rule.message}
    if rule.field and not rule.field.startswith("metadata"):
        validation["fieldPath"] = f".{rule.field}"
    return validation


def _sentence(text: str) -> str:
    """Return a docstring as one line."""
    return " ".join(text.split())
