"""What a real API server makes of the resources: what it refuses, stores, shows and scales.

The committed CRDs are installed under other API groups, so that no operator acts on what is written
here, and the real ones stay Helm's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.cluster.waiting import until
from penstock_operator import manifests
from penstock_operator.loader import load_manifest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.kubectl import Kubectl

Object = dict[str, Any]

ROOT = Path(__file__).parents[1]
OURS = "penstock.dev"
TWIN = "twin.penstock.test"
OLDER = "older.penstock.test"
SAMPLES = sorted((ROOT / "crds" / "samples").glob("*.yaml"))
TABLE = yaml.safe_load(
    (ROOT / "tests" / "unit" / "control" / "table_of_manifests.yaml").read_text()
)
KEYS = {"curve.public": "p" * 40, "curve.secret": "s" * 40}


def committed(plural: str, group: str) -> Object:
    """Return a CRD as it is committed, of another group and without its short names."""
    crd: Object = yaml.safe_load((ROOT / "crds" / f"{OURS}_{plural}.yaml").read_text())
    crd["metadata"]["name"] = f"{plural}.{group}"
    crd["spec"]["group"] = group
    del crd["spec"]["names"]["shortNames"], crd["spec"]["names"]["categories"]
    return crd


def install(kubectl: Kubectl, crd: Object) -> None:
    kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(crd))
    name = crd["metadata"]["name"]
    kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=60s")

    def served() -> bool:
        plural, _, group = name.partition(".")
        path = f"/apis/{group}/v1alpha1/{plural}"
        return not kubectl("get", "--raw", path, check=False).returncode

    until(f"{name} is served", served, seconds=60)


@pytest.fixture(scope="module")
def twins(kubectl: Kubectl) -> Iterator[None]:
    plurals = ("inferenceservices", "rolescalers")
    for plural in plurals:
        install(kubectl, committed(plural, TWIN))
    yield
    for plural in plurals:
        kubectl("delete", "crd", f"{plural}.{TWIN}", "--timeout=120s")


def service(name: str, spec: Object, group: str = TWIN) -> Object:
    return {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": spec,
    }


def apply(kubectl: Kubectl, namespace: str, value: Object, *flags: str) -> Object:
    done = kubectl(
        *("apply", "--server-side", "-n", namespace, "-o", "json", "-f", "-", *flags),
        stdin=json.dumps(value),
    )
    found: Object = json.loads(done.stdout)
    return found


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case["case"])
def test_the_api_server_is_of_one_mind_with_penstock(kubectl: Kubectl, case: Object) -> None:
    """Tests of the control plane put the same table to `penstock`."""
    manifest = service(case.get("name", "chat"), case["spec"])
    done = kubectl(
        *("create", "--dry-run=server", "-f", "-"), stdin=json.dumps(manifest), check=False
    )
    said = re.sub(r"\s+", " ", done.stderr)
    refused: dict[str, str] = case.get("refused", {})
    assert bool(done.returncode) == bool(refused), said
    assert said.count("Invalid value") == len(refused), said
    for field, message in refused.items():
        assert message in said
        assert field.startswith("metadata") or f"{field}: Invalid value" in said


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({}, "spec.model: Required value"),
        ({"model": {"uri": "file:///m"}, "prefil": {}}, 'unknown field "spec.prefil"'),
        ({"model": {"uri": "file:///m"}, "decode": {"replicas": 0}}, "spec.decode.replicas"),
        ({"model": {"uri": "file:///m"}, "router": {"port": "http"}}, "spec.router.port"),
        ({"model": {"uri": "file:///m"}, "kvCache": {"pageSize": 17}}, "spec.kvCache.pageSize"),
        ({"model": {"uri": "file:///m"}, "kvCache": {"memory": 1.5}}, "spec.kvCache.memory"),
    ],
)
def test_types_and_ranges_are_refused_by_the_schema(
    kubectl: Kubectl, spec: Object, complaint: str
) -> None:
    text = json.dumps(service("chat", spec))
    done = kubectl("create", "--dry-run=server", "-f", "-", stdin=text, check=False)
    assert done.returncode
    assert complaint in done.stderr


# --- what is stored ---------------------------------------------------------------------------


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_applying_again_changes_nothing(kubectl: Kubectl, namespace: str, path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    manifest["apiVersion"] = f"{TWIN}/v1alpha1"
    first = apply(kubectl, namespace, manifest)
    second = apply(kubectl, namespace, manifest)
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    for flags in ((), ("--server-side",)):
        difference = kubectl(
            *("diff", "-n", namespace, "-f", "-", *flags), stdin=json.dumps(manifest), check=False
        )
        assert difference.returncode == 0, difference.stdout
    stored = {**second, "apiVersion": f"{OURS}/v1alpha1"}
    meant = load_manifest(path.read_text())
    assert parse_manifest(stored).spec == meant.spec, "stored defaults are ours"


UNUSUAL = service(
    "unusual",
    {
        "model": {"uri": "oci://registry.example/models/qwen3:1"},
        "prefill": {"resources": {"cpu": "0.5", "memory": "1e9"}},
        "decode": {"resources": {"cpu": "2500m", "memory": "0.1Gi"}, "extraArgs": ["--x"]},
        "router": {"resources": {"memory": 1000}, "apiKeySecret": "keys"},
        "image": {"pullSecrets": ["registry"]},
    },
    OURS,
)


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize(
    "text",
    [*(path.read_text() for path in SAMPLES), json.dumps(UNUSUAL)],
    ids=[*(path.stem for path in SAMPLES), "unusual"],
)
def test_rendered_objects_are_stored_as_they_are_rendered(
    kubectl: Kubectl, namespace: str, text: str
) -> None:
    """Nothing is dropped or written in another form: or every apply would be a change."""
    chosen = load_manifest(text)
    metadata = chosen.metadata.model_copy(update={"namespace": namespace})
    chosen = chosen.model_copy(update={"metadata": metadata})
    objects = manifests.render(chosen, manifests.Inputs(keys=KEYS))
    for rendered in objects:
        if rendered["kind"] == "RoleScaler":
            rendered["apiVersion"] = f"{TWIN}/v1alpha1"
        stored = apply(kubectl, namespace, rendered, "--dry-run=server")
        assert list(differences(rendered, stored)) == []


def differences(asked: Any, stored: Any, path: str = "") -> Iterator[str]:
    """Give the places at which `stored` does not hold what was asked for."""
    if isinstance(asked, dict) and isinstance(stored, dict):
        for key, value in asked.items():
            yield from differences(value, stored.get(key), f"{path}.{key}")
    elif isinstance(asked, list) and isinstance(stored, list) and len(asked) == len(stored):
        for index, (one, other) in enumerate(zip(asked, stored, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif asked != stored:
        yield f"{path}: {asked!r} became {stored!r}"


def test_an_object_of_an_older_release_is_still_there(kubectl: Kubectl, namespace: str) -> None:
    """With fewer fields, and others that are gone."""
    crd = committed("inferenceservices", OLDER)
    (version,) = crd["spec"]["versions"]
    current = version["schema"]["openAPIV3Schema"]
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version["schema"]["openAPIV3Schema"] = anything
    install(kubectl, crd)
    try:
        spec = {"model": {"uri": "hf://a/b"}, "decode": {"tensorParallel": 8, "gone": 1}}
        apply(kubectl, namespace, service("old", spec, OLDER))
        kind = f"inferenceservices.{OLDER}"
        merge = ("patch", kind, "old", "-n", namespace, "--type=merge")
        kubectl(*merge, "--subresource=status", "-p", '{"status": {"url": "http://x", "gone": 1}}')

        version["schema"]["openAPIV3Schema"] = current
        install(kubectl, crd)

        def defaulted() -> bool:
            shown = kubectl("get", kind, "old", "-n", namespace, "-o", "json").stdout
            return "router" in json.loads(shown)["spec"]

        until("the new schema is in force", defaulted, seconds=60)
        kubectl("annotate", kind, "old", "-n", namespace, "team=a")
        kubectl(*merge, "--subresource=status", "-p", '{"status": {"transport": "tcp"}}')
        found = json.loads(kubectl("get", kind, "old", "-n", namespace, "-o", "json").stdout)
        read = parse_manifest({**found, "apiVersion": f"{OURS}/v1alpha1"})
        assert read.status is not None
        assert (read.status.url, read.status.transport) == ("http://x", "tcp")
    finally:
        kubectl("delete", "crd", crd["metadata"]["name"], "--timeout=120s")


# --- what is shown ----------------------------------------------------------------------------


@pytest.mark.usefixtures("twins")
def test_explain_reads_well(kubectl: Kubectl) -> None:
    version = f"--api-version={TWIN}/v1alpha1"
    prefill = kubectl("explain", version, "inferenceservice.spec.prefill").stdout
    flowing = re.sub(r"\s+", " ", prefill)
    assert "Groups of workers that compute the KV of prompts; one group is one pipeline" in flowing
    for field in ("replicas", "autoscaling", "pipelineParallel", "resources", "podTemplate"):
        assert field in prefill
    for resource in ("inferenceservice", "rolescaler"):
        for part in ("spec", "status"):
            text = kubectl("explain", version, f"{resource}.{part}").stdout
            assert "<no description>" not in text
            assert "<empty>" not in text


@pytest.mark.usefixtures("twins")
def test_columns_tell_what_a_person_asks_first(kubectl: Kubectl, namespace: str) -> None:
    apply(kubectl, namespace, service("chat", {"model": {"uri": "hf://a/b"}, "prefill": {}}))
    ready = {
        "type": "Ready",
        "status": "False",
        "reason": "GangIncomplete",
        "message": "PrefillReady: chat-prefill-0 waits for stage 1",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    counts = {"replicas": 2, "ready": 1, "updated": 1, "revision": "abcd", "summary": "1/2"}
    status = {
        "observedGeneration": 1,
        "model": "hf://a/b",
        "conditions": [ready],
        "prefill": {**counts, "summary": "0/1"},
        "decode": counts,
        "router": {**counts, "summary": "2/2"},
        "url": "http://chat-router.default.svc:8000",
        "transport": "tcp",
    }
    kind = f"inferenceservices.{TWIN}"
    patch = json.dumps({"status": status})
    kubectl(
        *("patch", kind, "chat", "-n", namespace, "--type=merge"),
        *("--subresource=status", "-p", patch),
    )
    heading, row = kubectl("get", kind, "-n", namespace).stdout.splitlines()
    assert heading.split() == [
        "NAME", "MODEL", "READY", "REASON", "PREFILL", "DECODE", "ROUTER", "URL", "AGE"
    ]  # fmt: skip
    assert row.split()[:-1] == [
        "chat", "hf://a/b", "False", "GangIncomplete", "0/1", "1/2", "2/2",
        "http://chat-router.default.svc:8000",
    ]  # fmt: skip
    wide = kubectl("get", kind, "-n", namespace, "-o", "wide").stdout
    assert "MESSAGE" in wide
    assert "waits for stage 1" in wide
    assert re.search(r"REVISION +TRANSPORT\n.* abcd +tcp\n", wide)


# --- what scales ------------------------------------------------------------------------------


@pytest.mark.usefixtures("twins")
def test_a_role_is_scaled_by_its_scale_subresource(kubectl: Kubectl, namespace: str) -> None:
    chosen = load_manifest((ROOT / "crds" / "samples" / "minimal.yaml").read_text())
    created, *_ = manifests.role_scalers(chosen, manifests.Inputs(), new=True)
    applied, *_ = manifests.role_scalers(chosen, manifests.Inputs(), new=False)
    for scaler in (created, applied):
        scaler["apiVersion"] = f"{TWIN}/v1alpha1"
        del scaler["metadata"]["namespace"]
    name, kind = created["metadata"]["name"], f"rolescalers.{TWIN}"
    kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(created))
    manager = "--field-manager=penstock-operator"
    apply(kubectl, namespace, applied, manager)
    kubectl("scale", kind, name, "--replicas=3", "-n", namespace)
    again = apply(kubectl, namespace, applied, manager)
    assert again["spec"]["replicas"] == 3, "an apply does not take the number back"
    status = {"status": {"replicas": 3, "selector": "penstock.dev/role=decode"}}
    kubectl(
        *("patch", kind, name, "-n", namespace, "--type=merge"),
        *("--subresource=status", "-p", json.dumps(status)),
    )
    path = f"/apis/{TWIN}/v1alpha1/namespaces/{namespace}/rolescalers/{name}/scale"
    scale = json.loads(kubectl("get", "--raw", path).stdout)
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 3, "selector": "penstock.dev/role=decode"}
    heading, row = kubectl("get", kind, "-n", namespace).stdout.splitlines()
    assert heading.split() == ["NAME", "SERVICE", "ROLE", "WANTED", "RUNNING", "AGE"]
    assert row.split()[:-1] == [name, "minimal", "decode", "3", "3"]


@pytest.mark.usefixtures("twins")
def test_a_scaler_is_named_after_its_role(kubectl: Kubectl, namespace: str) -> None:
    scaler = {
        "apiVersion": f"{TWIN}/v1alpha1",
        "kind": "RoleScaler",
        "metadata": {"name": "chat-decode"},
        "spec": {"service": "chat", "role": "prefill"},
    }
    text = json.dumps(scaler)
    done = kubectl("create", "-n", namespace, "-f", "-", stdin=text, check=False)
    assert "a RoleScaler is named SERVICE-ROLE, as it says in its spec" in done.stderr


@pytest.mark.usefixtures("twins")
def test_an_autoscaler_finds_what_it_scales(kubectl: Kubectl, namespace: str) -> None:
    scaler = {
        "apiVersion": f"{TWIN}/v1alpha1",
        "kind": "RoleScaler",
        "metadata": {"name": "chat-decode"},
        "spec": {"service": "chat", "role": "decode", "replicas": 2},
    }
    apply(kubectl, namespace, scaler)
    kind = f"rolescalers.{TWIN}"
    status = {"status": {"replicas": 2, "selector": "penstock.dev/role=decode"}}
    kubectl(
        *("patch", kind, "chat-decode", "-n", namespace, "--type=merge"),
        *("--subresource=status", "-p", json.dumps(status)),
    )
    target = {"apiVersion": f"{TWIN}/v1alpha1", "kind": "RoleScaler", "name": "chat-decode"}
    load = {"type": "Utilization", "averageUtilization": 50}
    metric = {"type": "Resource", "resource": {"name": "cpu", "target": load}}
    apply(
        kubectl,
        namespace,
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "chat-decode"},
            # More than run: what it has to correct without knowing any load.
            "spec": {
                "scaleTargetRef": target,
                "minReplicas": 4,
                "maxReplicas": 6,
                "metrics": [metric],
            },
        },
    )

    def scaled() -> bool:
        found = kubectl("get", kind, "chat-decode", "-n", namespace, "-o", "json").stdout
        return bool(json.loads(found)["spec"]["replicas"] == 4)

    until("the autoscaler has set its least", scaled, seconds=120)
