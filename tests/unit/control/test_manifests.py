"""Rendered objects: two golden files to read, and what must hold for every spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_operator import labels
from penstock_operator.local.commands import dump_objects
from penstock_operator.manifests import (
    Inputs,
    Object,
    layout,
    render,
    revision,
    role_scalers,
    router_url,
)
from tests.unit.control.samples import GOLDEN, sample, service

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {"curve.public": "p" * 40, "curve.secret": "s" * 40}


@pytest.mark.parametrize("name", ["disaggregated", "aggregated", "scale-to-zero", "s3"])
def test_golden(name: str) -> None:
    """After a wanted change: penstock render -f crds/samples/NAME.yaml > …/golden/NAME.yaml."""
    assert dump_objects(render(sample(name), Inputs())) == (GOLDEN / f"{name}.yaml").read_text()


def kinds(objects: list[Object]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in objects:
        found.setdefault(item["kind"], []).append(item["metadata"]["name"])
    return found


def container(objects: list[Object], role: str) -> Object:
    pods = [o for o in objects if o["metadata"]["labels"].get(labels.ROLE) == role]
    pods = [o for o in pods if o["kind"] in ("StatefulSet", "Deployment")]
    found: Object = pods[0]["spec"]["template"]["spec"]["containers"][0]
    return found


def flags(objects: list[Object], role: str) -> dict[str, str]:
    args = container(objects, role)["args"]
    return {arg: args[i + 1] for i, arg in enumerate(args[:-1]) if arg.startswith("--")}


def test_a_group_is_one_stateful_set_whose_ordinals_are_stages() -> None:
    objects = render(service(prefill={"replicas": 2, "pipelineParallel": 3}), Inputs())
    groups = [o for o in objects if o["kind"] == "StatefulSet"]
    assert [g["metadata"]["name"] for g in groups] == ["chat-prefill-0", "chat-prefill-1"]
    for group in groups:
        assert group["spec"]["replicas"] == 3
        assert group["spec"]["podManagementPolicy"] == "Parallel"
        assert group["spec"]["serviceName"] == "chat-workers"
    said = flags(objects, "prefill")
    assert (said["--stage"], said["--stages"]) == ("$(POD_INDEX)", "3")
    assert said["--peers"] == "chat-prefill-0-{i}.chat-workers.default.svc:7000"


def test_without_prefill_the_router_does_not_ask_for_it() -> None:
    objects = render(service(), Inputs())
    assert "StatefulSet" not in kinds(objects)
    assert "--no-require-prefill" in container(objects, "router")["args"]
    assert "chat-prefill" not in kinds(objects)["PodDisruptionBudget"]


def test_keys_are_given_and_never_made_up() -> None:
    assert "Secret" not in kinds(render(service(), Inputs()))
    (secret,) = [o for o in render(service(), Inputs(keys=KEYS)) if o["kind"] == "Secret"]
    assert secret["metadata"]["name"] == "chat-keys"
    assert set(secret["data"]) == set(KEYS)


def test_owner_references_are_on_every_object() -> None:
    owner = {"kind": "InferenceService", "name": "chat", "uid": "1"}
    for item in render(service(prefill={}), Inputs(keys=KEYS, owner=owner)):
        assert item["metadata"]["ownerReferences"] == [owner]


def test_an_hf_revision_a_claim_and_a_token_become_arguments_and_mounts() -> None:
    hub = {"uri": "hf://a/b", "revision": "v1", "tokenSecret": "t"}
    objects = render(service(model=hub), Inputs())
    assert flags(objects, "decode")["--model"] == "hf://a/b@v1"
    assert flags(objects, "router")["--hf-token-file"] == "/etc/penstock/model-token/token"
    claimed = render(service(model={"uri": "pvc://disk/dir/m"}), Inputs())
    assert flags(claimed, "decode")["--model"] == "file:///models/disk/dir/m"
    mounts = {m["mountPath"] for m in container(claimed, "router")["volumeMounts"]}
    assert "/models/disk" in mounts


def test_the_pod_template_patch_merges_by_name_and_keeps_our_labels() -> None:
    patch = {
        "metadata": {"labels": {labels.SERVICE: "stolen", "team": "a"}},
        "spec": {
            "nodeSelector": {"pool": "x"},
            "containers": [
                {"name": "worker", "env": [{"name": "A", "value": "1"}]},
                {"name": "side"},
            ],
        },
    }
    objects = render(service(decode={"podTemplate": patch}), Inputs())
    (deployment,) = [
        o
        for o in objects
        if o["metadata"]["name"].startswith("chat-decode-") and o["kind"] == "Deployment"
    ]
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"][labels.SERVICE] == "chat"
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["spec"]["nodeSelector"] == {"pool": "x"}
    assert [c["name"] for c in template["spec"]["containers"]] == ["worker", "side"]
    worker = template["spec"]["containers"][0]
    assert worker["command"] == ["penstock-worker"]
    assert {"name": "A", "value": "1"} in worker["env"]
    assert "POD_NAME" in [entry["name"] for entry in worker["env"]]


def test_a_patched_volume_takes_the_place_of_ours() -> None:
    nfs = {"name": "model", "nfs": {"server": "store", "path": "/m"}}
    patch = {"spec": {"volumes": [nfs, {"name": "more", "emptyDir": {}}]}}
    (deployment, *_) = [
        o
        for o in render(service(decode={"podTemplate": patch}), Inputs())
        if o["kind"] == "Deployment"
    ]
    volumes = {v["name"]: v for v in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["model"] == nfs
    assert {"keys", "cache", "tmp", "more"} <= set(volumes)


@pytest.mark.parametrize(
    ("uri", "argument", "volume", "path"),
    [
        (
            "file:///srv/my%20model",
            "file:///srv/my%20model",
            {"hostPath": {"path": "/srv/my model", "type": "Directory"}},
            "/srv/my model",
        ),
        (
            "pvc://disk/my model",
            "file:///models/disk/my%20model",
            {"persistentVolumeClaim": {"claimName": "disk", "readOnly": True}},
            "/models/disk",
        ),
        (
            "oci://registry/m:1",
            "file:///models/image",
            {"image": {"reference": "registry/m:1", "pullPolicy": "IfNotPresent"}},
            "/models/image",
        ),
    ],
)
def test_a_model_that_is_mounted_is_read_only(
    uri: str, argument: str, volume: Object, path: str
) -> None:
    objects = render(service(model={"uri": uri}), Inputs())
    for role in ("decode", "router"):
        assert flags(objects, role)["--model"] == argument
        mounts = {m["name"]: m for m in container(objects, role)["volumeMounts"]}
        assert mounts["model"] == {"name": "model", "mountPath": path, "readOnly": True}
    (deployment, *_) = [o for o in objects if o["kind"] == "Deployment"]
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"name": "model", **volume} in volumes


def test_an_object_store_is_told_in_the_uri_and_its_keys_as_a_directory() -> None:
    model = {
        "uri": "s3://bucket/a/b",
        "tokenSecret": "keys",
        "s3": {"endpoint": "http://minio:9000/", "region": "eu"},
    }
    objects = render(service(model=model), Inputs())
    said = flags(objects, "decode")
    assert said["--model"] == "s3://bucket/a/b?region=eu&endpoint=http%3A%2F%2Fminio%3A9000"
    assert said["--model-token-file"] == "/etc/penstock/model-token"
    cache = {"name": "XDG_CACHE_HOME", "value": labels.CACHE_MOUNT}
    assert cache in container(objects, "decode")["env"]
    plain = render(service(model={"uri": "s3://bucket/a/b"}), Inputs())
    assert flags(plain, "router")["--model"] == "s3://bucket/a/b?region=us-east-1"


def test_rdma_asks_for_the_resource_and_the_right_to_pin_memory() -> None:
    resources = {"rdma": {"resource": "rdma/ib", "count": 2}, "gpu": 1, "cpu": "1500m"}
    objects = render(service(decode={"resources": resources}), Inputs())
    worker = container(objects, "decode")
    assert worker["resources"]["limits"] == {"cpu": "1500m", "nvidia.com/gpu": "1", "rdma/ib": "2"}
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    said = flags(objects, "decode")
    assert (said["--threads"], said["--device"]) == ("2", "cuda")
    assert "--rdma" in worker["args"]
    plain = container(render(service(), Inputs()), "decode")
    assert "--rdma" not in plain["args"]


def test_a_gpu_brings_the_device_and_takes_its_memory() -> None:
    objects = render(service(decode={"resources": {"gpu": 2}}), Inputs())
    resources = container(objects, "decode")["resources"]
    assert resources["limits"] == resources["requests"] == {"nvidia.com/gpu": "2"}
    given = flags(objects, "decode")
    assert (given["--device"], given["--kv-memory"]) == ("cuda", "90%")


@pytest.mark.parametrize(
    ("spec", "device", "memory"),
    [
        ({}, "cpu", str(2**30)),
        ({"kvCache": {"memory": "2Gi"}}, "cpu", str(2**31)),
        (
            {"kvCache": {"memory": "2Gi"}, "decode": {"resources": {"gpu": 1}}},
            "cuda",
            str(2**31),
        ),
        ({"device": "cpu", "decode": {"resources": {"gpu": 1}}}, "cpu", str(2**30)),
    ],
)
def test_kv_memory_is_what_the_manifest_says_or_fits_the_device(
    spec: dict[str, Any], device: str, memory: str
) -> None:
    given = flags(render(service(**spec), Inputs()), "decode")
    assert (given["--device"], given["--kv-memory"]) == (device, memory)


def test_roles_that_the_manifest_does_not_number_have_a_scaler() -> None:
    chosen = service(
        prefill={"autoscaling": {"minReplicas": 2, "maxReplicas": 3}}, router={"replicas": 2}
    )
    created = role_scalers(chosen, Inputs(), new=True)
    assert [(s["metadata"]["name"], s["spec"]) for s in created] == [
        ("chat-prefill", {"service": "chat", "role": "prefill", "replicas": 2}),
        ("chat-decode", {"service": "chat", "role": "decode", "replicas": 1}),
    ]
    assert all("replicas" not in s["spec"] for s in role_scalers(chosen, Inputs(), new=False))


def test_the_router_wakes_roles_that_may_sleep_and_may_do_just_that() -> None:
    asleep = {"autoscaling": {"minReplicas": 0, "maxReplicas": 3}}
    objects = render(service(prefill=asleep, decode=asleep), Inputs())
    args = container(objects, "router")["args"]
    assert [args[i + 1] for i, arg in enumerate(args) if arg == "--wake"] == [
        "prefill=chat-prefill",
        "decode=chat-decode",
    ]
    (role,) = [o for o in objects if o["kind"] == "Role"]
    assert role["rules"][1] == {
        "apiGroups": ["penstock.dev"],
        "resources": ["rolescalers/scale"],
        "resourceNames": ["chat-prefill", "chat-decode"],
        "verbs": ["get", "patch"],
    }


def test_clients_are_sent_to_a_router_that_accepts() -> None:
    router = container(render(service(), Inputs()), "router")
    assert router["readinessProbe"]["httpGet"]["path"] == "/accepting"
    assert router["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_router_may_read_pods_and_nothing_else() -> None:
    (role,) = [o for o in render(service(), Inputs()) if o["kind"] == "Role"]
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    assert router_url(service(router={"port": 9000})) == "http://chat-router.default.svc:9000"


# --- revisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rolled"),
    [
        ({}, set()),
        ({"decode": {"replicas": 5}}, set()),
        ({"decode": {"autoscaling": {"maxReplicas": 5}}}, set()),
        ({"decode": {"autoscaling": {"minReplicas": 0, "maxReplicas": 5}}}, {"router"}),
        ({"prefill": {"replicas": 5}}, set()),
        ({"prefill": {"pipelineParallel": 2}}, {"prefill"}),
        ({"decode": {"extraArgs": ["--x"]}}, {"decode"}),
        ({"router": {"port": 1234}}, {"router"}),
        ({"kvCache": {"pageSize": 64}}, {"prefill", "decode"}),
        ({"model": {"uri": "file:///other"}}, {"prefill", "decode", "router"}),
    ],
)
def test_a_role_gets_a_new_revision_exactly_when_its_pods_change(
    change: dict[str, Any], rolled: set[str]
) -> None:
    before, after = service(prefill={}), service(**{"prefill": {}, **change})
    assert {r for r in labels.ROLES if revision(before, r) != revision(after, r)} == rolled


def test_the_layout_follows_what_pages_depend_on_and_nothing_else() -> None:
    base = layout(service())
    assert layout(service(decode={"replicas": 2, "extraArgs": ["--x"]})) == base
    assert layout(service(kvCache={"memory": "2Gi"})) == base
    assert layout(service(kvCache={"pageSize": 64})) != base
    assert layout(service(model={"uri": "file:///other"})) != base


# --- for every spec ---------------------------------------------------------------------------


specs = st.fixed_dictionaries(
    {},
    optional={
        "prefill": st.fixed_dictionaries(
            {},
            optional={"replicas": st.integers(1, 3), "pipelineParallel": st.integers(1, 4)},
        ),
        "decode": st.fixed_dictionaries({"replicas": st.integers(1, 4)}),
        "router": st.fixed_dictionaries(
            {}, optional={"replicas": st.integers(1, 2), "apiKeySecret": st.just("k")}
        ),
        "image": st.just({"runtime": "r:1", "pullSecrets": ["s"]}),
    },
)


def _unstable(value: Any, path: str = "") -> Iterator[str]:
    """Give the paths of what would be dropped, or is missing from a key by which applies merge."""
    if isinstance(value, dict):
        if "containerPort" in value and "protocol" not in value:
            yield path
        for key, inner in value.items():
            if inner is None or inner == [] or (inner == {} and key != "emptyDir"):
                yield f"{path}.{key}"
            yield from _unstable(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unstable(inner, f"{path}[{index}]")


@settings(max_examples=15, deadline=None)
@given(specs)
def test_objects_fit_together(spec: dict[str, Any]) -> None:
    chosen = service(**spec)
    objects = render(chosen, Inputs(keys=KEYS))
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)
    assert yaml.safe_load(yaml.safe_dump(objects)) == objects, "plain data only"
    assert not list(_unstable(objects)), "the API server would give something else back"
    workloads = [o for o in objects if o["kind"] in ("StatefulSet", "Deployment")]
    selectors = [tuple(sorted(o["spec"]["selector"]["matchLabels"].items())) for o in workloads]
    assert len(set(selectors)) == len(selectors), "no two workloads select the same pods"
    for workload in workloads:
        template = workload["spec"]["template"]
        own = template["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= own.items()
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        main = pod["containers"][0]
        assert {mount["name"] for mount in main["volumeMounts"]} <= volumes
        ports = {port["name"] for port in main["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert main[probe]["httpGet"]["port"] in ports
        defined = {entry["name"] for entry in main["env"]}
        used = {a.split("$(")[1].split(")")[0] for a in main["args"] if "$(" in a}
        assert used <= defined
        drain = float(main["args"][main["args"].index("--drain-seconds") + 1])
        assert drain < pod["terminationGracePeriodSeconds"]
