"""The CustomResourceDefinitions: committed as they are made, structural, of one mind with `api`.

That a real API server takes them, and refuses what they refuse, is asked in e2e/test_crds.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator import rules
from penstock_operator.crds import DEFINITIONS, crd_text, definition
from penstock_operator.errors import ManifestError
from penstock_operator.loader import parse_manifest
from penstock_operator.scaler import RoleScaler
from tests.unit.control.samples import ROOT, SAMPLES, TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic import BaseModel

Schema = dict[str, Any]
COMMITTED = (ROOT / "crds", ROOT / "charts" / "penstock" / "files" / "crds")


@pytest.mark.parametrize("plural", DEFINITIONS)
@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.parent.name)
def test_what_is_committed_is_what_is_made(plural: str, folder: Path) -> None:
    file = folder / f"penstock.dev_{plural}.yaml"
    assert file.read_text() == crd_text(plural), (
        f"make it again: penstock crds {plural} > {file.relative_to(ROOT)}"
    )


# --- schema -----------------------------------------------------------------------------------


def root(plural: str = "inferenceservices") -> Schema:
    found: Schema = definition(plural)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def walk(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{name}")
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")


def at(path: str) -> Schema:
    return dict(walk(root()))[path]


@pytest.mark.parametrize("plural", DEFINITIONS)
def test_every_field_is_explained(plural: str) -> None:
    own = {".apiVersion", ".kind", ".metadata"}  # the API server explains these
    silent = [
        path
        for path, schema in walk(root(plural))
        if not schema.get("description") and path not in own and not path.endswith("[]")
    ]
    assert silent == []


@pytest.mark.parametrize("plural", DEFINITIONS)
def test_the_schema_is_structural(plural: str) -> None:
    for path, schema in walk(root(plural)):
        assert not {"$ref", "oneOf", "allOf", "additionalProperties"} & set(schema), path
        assert ("type" in schema) != ("x-kubernetes-int-or-string" in schema), path
        if path.startswith(".status"):
            assert "default" not in schema, f"{path} would be written without being observed"


def test_parts_have_the_forms_that_the_api_server_wants() -> None:
    assert at(".status.conditions")["x-kubernetes-list-map-keys"] == ["type"]
    assert at(".spec.decode.podTemplate")["x-kubernetes-preserve-unknown-fields"] is True
    assert at(".spec.kvCache.memory")["x-kubernetes-int-or-string"] is True
    assert at(".spec")["required"] == ["model"]
    assert "required" not in at(".status"), "an older status has fewer fields"
    assert at(".spec.kvCache.pageSize") | {"description": ""} == {
        "description": "", "default": 32, "type": "integer", "enum": [8, 16, 32, 64, 128],
    }  # fmt: skip


def test_only_what_may_never_move_is_stored_as_a_default() -> None:
    assert at(".spec.decode")["default"] == {
        "resources": {"gpu": 0},
        "tensorParallel": 1,
        "chunkedPrefill": {"mode": "adaptive"},
    }
    assert at(".spec.router.port")["default"] == 8000
    assert "default" not in at(".spec.prefill"), "there is none unless asked for"
    assert "default" not in at(".spec.image.runtime"), "it follows the operator's release"


def test_scalers_have_the_scale_subresource() -> None:
    (version,) = definition("rolescalers")["spec"]["versions"]
    assert version["subresources"] == {
        "status": {},
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    }
    found = RoleScaler.model_validate(
        {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "RoleScaler",
            "metadata": {"name": "chat-decode"},
            "spec": {"service": "chat", "role": "decode"},
        }
    )
    assert list(rules.broken(found)) == []
    renamed = found.model_copy(update={"spec": found.spec.model_copy(update={"role": "prefill"})})
    assert [str(problem) for problem in rules.broken(renamed)] == [
        "metadata.name: a RoleScaler is named SERVICE-ROLE, as it says in its spec"
    ]


def test_columns_point_to_fields_that_exist() -> None:
    for plural in DEFINITIONS:
        paths = dict(walk(root(plural)))
        for column in definition(plural)["spec"]["versions"][0]["additionalPrinterColumns"]:
            path = column["jsonPath"].replace('[?(@.type=="Ready")]', "[]")
            assert path in paths or path == ".metadata.creationTimestamp"


# --- defaults ---------------------------------------------------------------------------------


def defaulted(schema: Schema, value: Any) -> Any:
    """Put defaults in as the API server does: from the outside to the inside."""
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    found = dict(value)
    for name, inner in schema["properties"].items():
        if name not in found and "default" in inner:
            found[name] = inner["default"]
        if name in found:
            found[name] = defaulted(inner, found[name])
    return found


def assert_defaults_change_nothing(raw: Schema) -> None:
    stored = defaulted(root(), raw)
    assert parse_manifest(stored) == parse_manifest(raw)
    assert defaulted(root(), stored) == stored


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_stored_sample_means_what_it_meant(path: Path) -> None:
    assert_defaults_change_nothing(yaml.safe_load(path.read_text()))


roles = st.fixed_dictionaries(
    {},
    optional={
        "resources": st.sampled_from([{}, {"cpu": 2}, {"memory": "1Gi"}]),
        "chunkedPrefill": st.sampled_from([{}, {"mode": "fixed"}, {"maxTokens": 64}]),
        "autoscaling": st.sampled_from([{"maxReplicas": 2}, {"minReplicas": 0, "maxReplicas": 1}]),
    },
)


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional={"prefill": roles, "decode": roles}))
def test_any_stored_spec_means_what_it_meant(spec: Schema) -> None:
    assert_defaults_change_nothing(
        {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat"},
            "spec": {"model": {"uri": "file:///m"}, **spec},
        }
    )


# --- rules ------------------------------------------------------------------------------------


def refusals(case: Schema) -> dict[str, str]:
    manifest = {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": case.get("name", "chat")},
        "spec": case["spec"],
    }
    try:
        parse_manifest(manifest)
    except ManifestError as error:
        return {problem.path: problem.reason for problem in error.problems}
    return {}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case["case"])
def test_the_table_of_manifests(case: Schema) -> None:
    assert refusals(case) == case.get("refused", {})


def test_every_rule_is_in_the_schema_and_in_the_table() -> None:
    said = [
        (validation["rule"], validation["message"])
        for plural in DEFINITIONS
        for _, schema in walk(root(plural))
        for validation in schema.get("x-kubernetes-validations", [])
    ]
    own = [rule for of_model in rules.RULES.values() for rule in of_model]
    assert {(rule.cel, rule.message) for rule in own} == set(said)
    asked = {message for case in TABLE for message in case.get("refused", {}).values()}
    of_services = {rule.message for rule in own} - {
        rule.message for rule in rules.RULES[RoleScaler]
    }
    assert asked == of_services


def test_rules_blame_fields_that_exist() -> None:
    def blamed(model: type[BaseModel]) -> list[str]:
        return [rule.field for rule in rules.rules_of(model) if rule.field]

    for model in rules.RULES:
        for field in blamed(model):
            part: Any = model.model_json_schema()
            definitions = part.get("$defs", {})
            for name in field.split("."):
                part = resolved(part["properties"][name], definitions)


def resolved(schema: Schema, definitions: Schema) -> Schema:
    for option in (schema, *schema.get("anyOf", [])):
        if "$ref" in option:
            found: Schema = definitions[option["$ref"].rpartition("/")[2]]
            return found
    return schema
