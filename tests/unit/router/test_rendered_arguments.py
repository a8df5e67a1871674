"""What the operator renders for a router is what a router understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock_operator.loader import load_manifest
from penstock_operator.manifests import Inputs, render
from penstock_router.http import OPEN_PATHS
from penstock_router.kubernetes_discovery import PodSet
from penstock_router.settings import parse

SAMPLES = sorted((Path(__file__).parents[3] / "crds" / "samples").glob("*.yaml"))


def router_container(sample: Path) -> dict[str, Any]:
    objects = render(load_manifest(sample.read_text()), Inputs())
    found: dict[str, Any] = next(
        container
        for each in objects
        if each["kind"] == "Deployment"
        for container in each["spec"]["template"]["spec"]["containers"]
        if container["name"] == "router"
    )
    return found


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_rendered_arguments_are_settings(sample: Path) -> None:
    settings = parse(router_container(sample)["args"])
    name = load_manifest(sample.read_text()).name
    pods = PodSet.parse(settings.discovery.removeprefix("kubernetes:"))
    assert pods == PodSet("default", f"penstock.dev/service={name}")
    asleep = {"decode": f"{name}-decode", "prefill": f"{name}-prefill"}
    assert settings.scalers == (asleep if sample.stem == "scale-to-zero" else {})


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_probes_need_no_key(sample: Path) -> None:
    container = router_container(sample)
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["httpGet"]["path"] for probe in probes} <= OPEN_PATHS
