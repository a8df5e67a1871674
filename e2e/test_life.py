"""A service from `kubectl apply` to `kubectl delete`, as a newcomer meets it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from openai import OpenAI

from e2e.service import MODEL, READY_SECONDS

if TYPE_CHECKING:
    from e2e.cluster.cluster import Cluster
    from e2e.service import Service, Services

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def ready(services: Services) -> Service:
    """A service that was applied and waited for, as the documentation says."""
    service = services.create("life", name="chat")
    service.apply()
    timeout = f"--timeout={READY_SECONDS}s"
    service.kubectl(
        *("wait", "--for=condition=Ready", "inferenceservice/chat", timeout),
        *("--namespace", service.namespace),
        seconds=READY_SECONDS + 30,
    )
    return service


def test_ready_means_that_a_chat_is_answered(ready: Service) -> None:
    with OpenAI(base_url=f"{ready.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": "Remember: falcon is copper. river is lantern. What is river?",
                }
            ],
            temperature=0,
            stream=True,
        )
        pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == "Sure, river is lantern."
    assert len(pieces) > 3


def test_the_stages_of_a_group_are_on_different_nodes(ready: Service, cluster: Cluster) -> None:
    stages = ready.pods("prefill")
    assert len(stages) == 2
    assert len({pod["spec"]["nodeName"] for pod in stages}) == min(2, cluster.settings.nodes)


def test_the_columns_tell_the_state(ready: Service) -> None:
    ready.wait_until_settled()
    header, row = ready.run("get", "inferenceservices").splitlines()
    cells = dict(zip(re.split(r"\s{2,}", header), re.split(r"\s{2,}", row), strict=True))
    assert cells["NAME"] == "chat"
    assert cells["MODEL"] == ready.spec["model"]["name"]
    assert cells["READY"] == "True"
    assert cells["PREFILL"] == "1/1"
    assert cells["DECODE"] == "2/2"
    assert cells["ROUTER"] == "1/1"
    assert cells["URL"] == f"http://chat-router.{ready.namespace}.svc:8000"
    wide = ready.run("get", "inferenceservices", "-o", "wide").splitlines()[0].split()
    assert {"MESSAGE", "REVISION", "TRANSPORT"} <= set(wide)


def test_describe_reads_well(ready: Service) -> None:
    told = ready.run("describe", "inferenceservice", "chat")
    for kind in ("Ready", "ConfigValid", "PrefillReady", "DecodeReady", "KVTransferReady"):
        assert re.search(rf"Type:\s+{kind}\b", told)
    assert re.search(r"Normal\s+AllReady\s", told), told[-2000:]


def test_applying_the_same_manifest_again_changes_nothing(ready: Service) -> None:
    ready.wait_until_settled()
    before = ready.read()
    pods = {pod["metadata"]["uid"] for pod in ready.pods()}
    ready.apply()
    manifest = {key: before[key] for key in ("apiVersion", "kind", "spec")}
    manifest["metadata"] = {"name": ready.name, "namespace": ready.namespace}
    diff = ready.kubectl("diff", "-f", "-", stdin=json.dumps(manifest), check=False)
    assert diff.returncode == 0, diff.stdout
    assert ready.read()["metadata"]["generation"] == before["metadata"]["generation"]
    assert {pod["metadata"]["uid"] for pod in ready.pods()} == pods


def test_containers_run_as_nobody_and_write_nowhere(ready: Service) -> None:
    for pod in ready.pods():
        name = pod["metadata"]["name"]
        assert ready.run("exec", name, "--", "id", "-u").strip() == "10001"
        touch = ("exec", name, "--namespace", ready.namespace, "--", "touch", "/opt/penstock/x")
        assert "Read-only file system" in ready.kubectl(*touch, check=False).stderr


def test_a_rollout_under_load_fails_no_stream(ready: Service) -> None:
    ready.wait_until_settled()
    with ready.load() as load:
        ready.spec["decode"]["chunkedPrefill"] = {"maxTokens": 256}
        ready.apply()
        ready.wait_until_settled(seconds=420)
        load.goes_on()
    load.check()


def test_deleting_it_leaves_nothing(ready: Service) -> None:
    ready.delete()
    ready.wait_until_gone()
