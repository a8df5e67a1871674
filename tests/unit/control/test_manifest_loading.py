"""Manifests are read with their defaults, and refused with path, line and reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator import api
from penstock_operator.checks import model_problems
from penstock_operator.errors import ManifestError
from penstock_operator.loader import dump_manifest, load_manifest, parse_manifest
from penstock_operator.quantity import canonical_quantity, parse_quantity
from tests.unit.control.samples import SAMPLES, service

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

HEAD = """\
apiVersion: penstock.dev/v1alpha1
kind: InferenceService
metadata: {name: chat}
spec:
  model: {uri: "hf://Qwen/Qwen3-8B"}
"""


def refused(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load_manifest(text, source="service.yaml")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_load_and_survive_a_round_trip(path: Path) -> None:
    loaded = load_manifest(path.read_text())
    assert parse_manifest(dump_manifest(loaded)) == loaded


def test_a_model_is_enough() -> None:
    spec = load_manifest(HEAD).spec
    assert spec.prefill is None
    assert (spec.decode.wanted, spec.router.wanted, spec.router.port) == (1, 1, 8000)
    assert spec.model.served_name == "Qwen3-8B"
    assert spec.computes_on == "cpu"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "  prefill:\n    pipelineParalel: 2\n",
            "line 7: spec.prefill.pipelineParalel: unknown field; did you mean pipelineParallel?",
        ),
        (
            "  decode: {replicas: 0}\n",
            "line 6: spec.decode.replicas: input should be greater than or equal to 1, not 0",
        ),
        (
            "  decode: {replicas: 1, autoscaling: {maxReplicas: 2}}\n",
            "line 6: spec.decode: replicas and autoscaling exclude each other: keep one",
        ),
        (
            "  decode: {autoscaling: {minReplicas: 3, maxReplicas: 2}}\n",
            "line 6: spec.decode.autoscaling.minReplicas: minReplicas is more than maxReplicas",
        ),
        (
            "  kvCache: {memory: 1Q}\n",
            (
                "line 6: spec.kvCache.memory: must be a quantity of more than 0, such as 500m, 2, "
                "16Gi or 1.5G"
            ),
        ),
        (
            "  decode: {resources: {cpu: 1.5}}\n",
            (
                "line 6: spec.decode.resources.cpu: 1.5 is neither a whole number nor a text: "
                'write "1.5"'
            ),
        ),
        (
            "  kvCache: {pageSize: 17}\n",
            "line 6: spec.kvCache.pageSize: 17 is not one of 8, 16, 32, 64 or 128",
        ),
        (
            "  device: tpu\n",
            "line 6: spec.device: 'tpu' is not one of 'cpu' or 'cuda'",
        ),
        ("  device: cpu\n  device: cuda\n", "line 7: spec.device: given twice; keep one"),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_reason(lines: str, problem: str) -> None:
    assert refused(HEAD + lines) == [problem]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("{name: x}", "spec.model.uri: required, but not given"),
        (
            "{uri: Qwen/Qwen3-8B}",
            (
                "spec.model.uri: a model's URI begins with one of file://, hf://, pvc://, s3://, "
                "oci://"
            ),
        ),
        (
            "{uri: 'file:///m', revision: v1}",
            "spec.model.revision: revision applies to hf:// repositories only",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: str, reason: str) -> None:
    text = HEAD.replace('{uri: "hf://Qwen/Qwen3-8B"}', model)
    assert refused(text) == [f"line 5: {reason}"]


def test_all_problems_are_told_at_once() -> None:
    assert len(refused(HEAD + "  device: tpu\n  prefil: {}\n  router: {port: 0}\n")) == 3
    rules = "  kvCache: {memory: 0}\n  decode: {resources: {cpu: x, rdma: {resource: y}}}\n"
    assert [problem.split(":")[1].strip() for problem in refused(HEAD + rules)] == [
        "spec.decode.resources.cpu",
        "spec.decode.resources.rdma.resource",
        "spec.kvCache.memory",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it holds 0 YAML documents; one InferenceService is expected"),
        (HEAD + "---\n" + HEAD, "it holds 2 YAML documents; one InferenceService is expected"),
        ("a: [1", "line 1: it is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("[1, 2]", "it is not a map of fields"),
        (
            "apiVersion: v1\nkind: Pod\n",
            "it is v1 Pod; expected apiVersion: penstock.dev/v1alpha1 and kind: InferenceService",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, reason: str) -> None:
    assert refused(text) == [reason]


def test_a_name_that_pods_cannot_have_is_refused() -> None:
    assert "metadata.name" in refused(HEAD.replace("name: chat", "name: Chat_1"))[0]
    assert "metadata.name" in refused(HEAD.replace("name: chat", f"name: {'a' * 41}"))[0]


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["spec", "model", "uri", "decode", "x", "kind", "metadata"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_other_data_is_refused_and_never_crashes(data: object) -> None:
    text = yaml.safe_dump(
        {"apiVersion": "penstock.dev/v1alpha1", "kind": "InferenceService", "a": data}
    )
    assert refused(text)


def test_every_field_is_documented() -> None:
    undocumented = [
        f"{model.__name__}.{name}"
        for model in _models()
        for name, field in model.model_fields.items()
        if not field.description and name not in ("api_version", "kind", "metadata")
    ]
    assert undocumented == []


def _models() -> list[type[BaseModel]]:
    return [m for m in vars(api).values() if isinstance(m, type) and issubclass(m, api.Strict)]


# --- scaling ----------------------------------------------------------------------------------


def test_scaling_respects_the_bounds_of_autoscaling() -> None:
    bounded = service(decode={"autoscaling": {"maxReplicas": 3}})
    assert bounded.scaled("decode", 3).spec.decode.wanted == 3
    with pytest.raises(ValueError, match=r"4 is outside decode\.autoscaling: 1 to 3"):
        bounded.scaled("decode", 4)
    with pytest.raises(ValueError, match="the manifest has no prefill"):
        bounded.scaled("prefill", 1)


def test_a_role_that_may_sleep_begins_awake() -> None:
    sleepy = service(decode={"autoscaling": {"minReplicas": 0, "maxReplicas": 3}}).spec.decode
    assert (sleepy.wanted, sleepy.bounds) == (1, (0, 3))
    assert service().spec.decode.bounds == (1, 1000)


# --- what cannot be given ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "config", "reason"),
    [
        (
            {"prefill": {"pipelineParallel": 5}},
            {"num_hidden_layers": 4},
            "5 stages cannot share 4 layers",
        ),
        (
            {"prefill": {"pipelineParallel": 2, "layersPerStage": [3, 4]}},
            {"num_hidden_layers": 8},
            "7 layers in all, the model has 8",
        ),
        (
            {"prefill": {"pipelineParallel": 2, "layersPerStage": [4.5, 4]}},
            {"num_hidden_layers": 8},
            "8.5 layers in all, the model has 8",
        ),
        (
            {"decode": {"tensorParallel": 3}},
            {"num_attention_heads": 16},
            "3 does not divide the model's 16 attention heads",
        ),
        (
            {"decode": {"tensorParallel": 4}},
            {"num_attention_heads": 24, "num_key_value_heads": 6},
            "4 neither divides the model's 6 key/value heads",
        ),
        (
            {"model": {"uri": "file:///m", "maxModelLen": 4096}},
            {"max_position_embeddings": 2048},
            "4096 is more than the 2048 positions",
        ),
        (
            {"prefill": {"pipelineParallel": 3}},
            {"text_config": {"num_hidden_layers": 2}},
            "3 stages cannot share 2 layers",
        ),
    ],
)
def test_sizes_that_the_model_does_not_allow_are_refused(
    spec: dict[str, object], config: dict[str, object], reason: str
) -> None:
    (problem,) = model_problems(service(**spec), config)
    assert problem.reason.startswith(reason)


def test_sizes_that_fit_are_accepted() -> None:
    config = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 2}
    fitting = service(prefill={"pipelineParallel": 28}, decode={"tensorParallel": 8})
    assert model_problems(fitting, config) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"uri": "pvc://models/a/b/"}, "b"),
        ({"uri": "s3://bucket"}, "bucket"),
        ({"uri": "oci://registry:5000/m/qwen3:1@sha256:ab"}, "qwen3"),
        ({"uri": "file:///m", "name": "given"}, "given"),
    ],
)
def test_the_name_that_clients_send(model: dict[str, str], name: str) -> None:
    assert service(model=model).spec.model.served_name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", 0.5),
        ("2", 2),
        ("1.5G", 1.5e9),
        ("16Gi", 16 * 2**30),
        ("1k", 1000),
        (".5Ki", 512),
        ("1e3", 1000),
        ("5E", 5e18),
        ("2u", 2e-6),
        ("+1.", 1),
    ],
)
def test_quantities(text: str, value: float) -> None:
    assert float(parse_quantity(text)) == value


@pytest.mark.parametrize("text", ["", "-1", "1e", "Gi", "1 Gi", "1KB", "0x1", "1.e3.", "1ee3"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("4", "4"),
        ("4000m", "4"),
        ("0.5", "500m"),
        ("1.5", "1500m"),
        ("1000", "1k"),
        ("1e3", "1k"),
        ("1024Mi", "1Gi"),
        ("1.5Gi", "1536Mi"),
        ("0.5Ki", "512"),
        ("1.5Ki", "1536"),
        ("69562.5Ki", "71232k"),
        ("0.1Gi", "107374182400m"),
        ("1073741824", "1073741824"),
        ("0", "0"),
        ("1000Mi", "1000Mi"),
        ("0.0000000001", "1n"),
        ("2048Ei", "2048Ei"),
    ],
)
def test_quantities_as_the_api_server_gives_them_back(text: str, stored: str) -> None:
    assert canonical_quantity(text) == stored


@given(
    st.integers(0, 10**6),
    st.sampled_from(["", "m", "k", "Ki", "Mi", "Gi", "M", "E"]),
    st.booleans(),
)
def test_a_canonical_quantity_is_worth_the_same_and_stays(
    number: int, suffix: str, half: bool
) -> None:
    text = f"{number}{'.5' if half else ''}{suffix}"
    stored = canonical_quantity(text)
    assert parse_quantity(stored) == parse_quantity(text)
    assert canonical_quantity(stored) == stored
