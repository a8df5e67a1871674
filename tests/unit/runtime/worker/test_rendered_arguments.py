"""What the operator renders for workers is what a worker understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock_operator.loader import load_manifest
from penstock_operator.manifests import Inputs, render
from penstock_runtime.worker.settings import KvMemory, WorkerSettings, parse

SAMPLES = sorted((Path(__file__).parents[4] / "crds" / "samples").glob("*.yaml"))
ON_GPU = """
apiVersion: penstock.dev/v1alpha1
kind: InferenceService
metadata: {name: chat}
spec:
  model: {uri: "hf://Qwen/Qwen3-8B"}
  prefill: {pipelineParallel: 2, resources: {gpu: 1}}
  decode: {resources: {gpu: 1}}
"""


def workers(text: str) -> dict[str, WorkerSettings]:
    objects: list[dict[str, Any]] = render(load_manifest(text), Inputs())
    containers = [
        container
        for each in objects
        if each["kind"] in {"Deployment", "StatefulSet"}
        for container in each["spec"]["template"]["spec"]["containers"]
        if container["command"] == ["penstock-worker"]
    ]
    variables = (("$(POD_INDEX)", "0"), ("$(POD_IP)", "127.0.0.1"), ("$(POD_NAME)", "pod"))
    found: dict[str, WorkerSettings] = {}
    for container in containers:
        arguments = container["args"]
        for variable, value in variables:
            arguments = [argument.replace(variable, value) for argument in arguments]
        settings = parse(arguments)
        found[settings.role] = settings
    return found


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_rendered_arguments_are_settings(sample: Path) -> None:
    assert "decode" in workers(sample.read_text())


def test_workers_with_gpus_compute_there_and_take_what_the_weights_leave() -> None:
    found = workers(ON_GPU)
    assert set(found) == {"prefill", "decode"}
    for settings in found.values():
        assert settings.device == "cuda"
        assert settings.kv_memory == KvMemory(share=0.9)
