"""The chart with Helm itself: lint, every rendering, install, upgrade, uninstall."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.cluster.errors import ProgramFailedError
from e2e.images.build import ROOT
from e2e.release import NAME, NAMESPACE
from penstock_operator.cluster import rbac

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from e2e.cluster.kubectl import Kubectl
    from e2e.release import Release

CHART = ROOT / "charts" / "penstock"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:penstock-operator"
CRDS = ("inferenceservices.penstock.dev", "rolescalers.penstock.dev")
EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "image": {"repository": "registry.example/operator", "tag": "t", "pullSecrets": ["pull"]},
    "extraArgs": ["--workers=4"],
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "system-cluster-critical",
    "serviceAccount": {"name": "other", "annotations": {"e": "f"}},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "rules": {"enabled": True, "slowFirstTokenSeconds": 2.5},
        "dashboard": {"enabled": True, "annotations": {"folder": "LLM"}},
    },
}
NAMESPACED = {"watchNamespaces": ["team-a", "team-b"]}
LEAST: dict[str, Any] = {
    "crds": {"install": False},
    "rbac": {"create": False, "aggregateToUsers": False},
    "serviceAccount": {"create": False},
    "metrics": {"service": False},
    "resources": None,
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "namespaced": NAMESPACED,
    "namespaced-everything": {**EVERYTHING, **NAMESPACED},
    "least": LEAST,
}
_THEIRS = "monitoring.coreos.com/v1"


@pytest.fixture
def release(operator_installed: Release) -> Iterator[Release]:
    """The release, with its default values again after the test."""
    yield operator_installed
    operator_installed.install(logLevel="info")


def render(release: Release, tmp_path: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    text = release.helm("template", NAME, str(CHART), "--kube-version=1.35.0", f"--values={file}")
    return [each for each in yaml.safe_load_all(text) if each]


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {
        f"{each['metadata'].get('namespace', '')}/{each['metadata']['name']}": each
        for each in objects
        if each["kind"] == kind
    }


def test_lint(operator_installed: Release) -> None:
    assert "0 chart(s) failed" in operator_installed.helm("lint", str(CHART), "--strict")


@pytest.mark.parametrize("which", VALUES)
def test_what_is_rendered_is_accepted(
    which: str, operator_installed: Release, kubectl: Kubectl, tmp_path: Path
) -> None:
    objects = render(operator_installed, tmp_path, VALUES[which])
    identities = [
        (o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects
    ]
    assert len(identities) == len(set(identities))
    for each in objects:
        if each["apiVersion"] == _THEIRS:
            continue
        if each["metadata"].get("namespace") in {"team-a", "team-b"}:
            each["metadata"]["namespace"] = NAMESPACE
        kubectl(
            *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-"),
            stdin=json.dumps(each),
        )


def test_rights_are_those_that_the_code_lists(operator_installed: Release, tmp_path: Path) -> None:
    served = [rule.manifest() for rule in rbac.CLUSTER_RULES]
    own = [rule.manifest() for rule in rbac.LEASE_RULES]
    objects = render(operator_installed, tmp_path, {})
    assert named(objects, "ClusterRole")["/penstock-operator"]["rules"] == served
    assert named(objects, "Role")[f"{NAMESPACE}/penstock-operator-lease"]["rules"] == own

    objects = render(operator_installed, tmp_path, NAMESPACED)
    roles = named(objects, "Role")
    assert "/penstock-operator" not in named(objects, "ClusterRole")
    assert not named(objects, "ClusterRoleBinding")
    assert roles.pop(f"{NAMESPACE}/penstock-operator-lease")["rules"] == own
    assert {where: role["rules"] for where, role in roles.items()} == {
        "team-a/penstock-operator": served,
        "team-b/penstock-operator": served,
    }


def test_monitors_rules_and_dashboard_are_whole(
    operator_installed: Release, tmp_path: Path
) -> None:
    objects = render(operator_installed, tmp_path, EVERYTHING)
    board = named(objects, "ConfigMap")[f"{NAMESPACE}/penstock-operator-dashboard"]
    assert json.loads(board["data"]["penstock.json"]) == json.loads(
        (CHART / "files" / "dashboard.json").read_text()
    )
    rules = named(objects, "PrometheusRule")[f"{NAMESPACE}/penstock-operator"]
    expressions = [r["expr"] for group in rules["spec"]["groups"] for r in group["rules"]]
    assert any(expression.endswith("> 2.5") for expression in expressions)
    assert "SLOW_FIRST_TOKEN_SECONDS" not in json.dumps(rules)
    assert named(objects, "PodMonitor")[f"{NAMESPACE}/penstock-operator-services"]["spec"][
        "namespaceSelector"
    ] == {"any": True}


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--set=replica=2", "replica"),
        ("--set=replicas=3", "replicas"),
        ("--set=crds.instal=false", "instal"),
        ("--set=logLevel=loud", "logLevel"),
        ('--set-json=watchNamespaces=["A"]', "watchNamespaces"),
        ("--set=metrics.podMonitor.interval=fast", "interval"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    flag: str, told: str, operator_installed: Release
) -> None:
    with pytest.raises(ProgramFailedError, match=told):
        operator_installed.helm("template", NAME, str(CHART), flag)


def test_an_upgrade_brings_new_crds(release: Release, kubectl: Kubectl, tmp_path: Path) -> None:
    """Into a cluster that has those of an older release."""
    older = tmp_path / "older"
    shutil.copytree(CHART, older)
    file = older / "files" / "crds" / f"penstock.dev_{CRDS[0].partition('.')[0]}.yaml"
    crd = yaml.safe_load(file.read_text())
    columns = crd["spec"]["versions"][0]["additionalPrinterColumns"]
    crd["spec"]["versions"][0]["additionalPrinterColumns"] = [
        column for column in columns if column["name"] != "URL"
    ]
    file.write_text(yaml.safe_dump(crd))

    def shown() -> list[str]:
        found = kubectl.get("crd", CRDS[0])["spec"]["versions"][0]["additionalPrinterColumns"]
        return [column["name"] for column in found]

    release.helm("upgrade", NAME, str(older), "--wait", "--timeout=180s")
    assert "URL" not in shown()
    release.helm("upgrade", NAME, str(CHART), "--wait", "--timeout=180s")
    assert "URL" in shown()
    assert "has been upgraded" in release.helm("upgrade", NAME, str(CHART), "--wait")


def test_the_operator_runs_without_privileges(release: Release, kubectl: Kubectl) -> None:
    pod = kubectl.get("pod", release.pods[0], "--namespace", NAMESPACE)
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    container = pod["spec"]["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_operator_may_do_what_it_needs_and_no_more(release: Release, kubectl: Kubectl) -> None:
    def may(verb: str, resource: str, namespace: str = "default") -> bool:
        asked = ("auth", "can-i", verb, resource, f"--as={OPERATOR}", f"--namespace={namespace}")
        return kubectl(*asked, check=False).stdout.strip() == "yes"

    assert may("patch", "deployments.apps")
    assert may("create", "secrets")
    assert not any(may(verb, "secrets") for verb in ("get", "list", "watch", "delete"))
    assert not may("create", "pods")
    assert not may("delete", "inferenceservices.penstock.dev")

    release.install(watchNamespaces=["kube-public"])
    assert may("patch", "deployments.apps", "kube-public")
    assert not may("patch", "deployments.apps")
    assert not may("list", "pods", NAMESPACE)
    release.install(watchNamespaces=[])
    assert may("patch", "deployments.apps")


def test_uninstall_keeps_crds_and_services(
    release: Release, kubectl: Kubectl, namespace: str
) -> None:
    service = {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "kept", "namespace": namespace},
        "spec": {"model": {"uri": "file:///nowhere"}},
    }
    kubectl.apply(service)
    release.uninstall()
    assert release.pods == []
    left = kubectl("get", "clusterroles", "-o", "name").stdout
    assert "penstock" not in left
    assert kubectl.get("inferenceservice", "kept", "--namespace", namespace)["spec"]["model"]
    release.install(logLevel="info")
    assert {c["metadata"]["name"] for c in kubectl.get("crds")["items"]} >= set(CRDS)
