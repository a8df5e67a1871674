"""How a pod gets its model: the argument that names it, volumes, and where downloads go. Pure.

    hf://    downloaded by the process into the cache volume
    s3://    the same; endpoint and region travel in the URI's query
    file://  a directory of the node, mounted read-only at the same path
    pvc://   a volume claim, mounted read-only below /models
    oci://   an image, mounted read-only as a volume (Kubernetes ≥ 1.31, feature ImageVolume)

Every mounted model is the volume `model`, so a patch of the pod template can put another source
(NFS, CSI) in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, unquote, urlencode, urlsplit

from penstock_operator import labels

if TYPE_CHECKING:
    from penstock_operator.api import InferenceService, Model

Object: TypeAlias = dict[str, Any]

VOLUME = "model"
_IMAGE_MOUNT = "/models/image"


def model_argument(service: InferenceService) -> str:
    """Return `--model`: a URI that the process can resolve by itself."""
    model = service.spec.model
    scheme, rest = model.scheme, _rest(model)
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        return "file://" + quote(f"/models/{claim}/{path}".rstrip("/"))
    if scheme == "oci":
        return f"file://{_IMAGE_MOUNT}"
    if scheme == "s3":
        return f"{model.uri}?{_s3_query(model)}"
    return f"{model.uri}@{model.revision}" if model.revision else model.uri


def model_volumes(service: InferenceService) -> tuple[list[Object], list[Object]]:
    """Return the volumes that hold the model, or access to it, and their mounts."""
    model = service.spec.model
    volumes: list[Object] = []
    mounts: list[Object] = []
    if model.token_secret is not None:
        secret = {"secretName": model.token_secret, "defaultMode": 0o440}
        volumes.append({"name": "model-token", "secret": secret})
        mounts.append(_mount("model-token", labels.MODEL_TOKEN_MOUNT))
    source = _source(service)
    if source is not None:
        volume, path = source
        volumes.append({"name": VOLUME, **volume})
        mounts.append(_mount(VOLUME, path))
    return volumes, mounts


def token_path(service: InferenceService) -> str | None:
    """Return the file with the hub's token, or the directory of an object store's keys."""
    model = service.spec.model
    if model.token_secret is None:
        return None
    if model.scheme == "s3":
        return labels.MODEL_TOKEN_MOUNT
    return f"{labels.MODEL_TOKEN_MOUNT}/{labels.TOKEN_ENTRY}"


def cache_env(service: InferenceService) -> list[Object]:
    """Return the environment by which downloads go to the cache volume."""
    scheme = service.spec.model.scheme
    if scheme == "hf":
        return [{"name": "HF_HOME", "value": f"{labels.CACHE_MOUNT}/huggingface"}]
    if scheme == "s3":
        return [{"name": "XDG_CACHE_HOME", "value": labels.CACHE_MOUNT}]
    return []


def _source(service: InferenceService) -> tuple[Object, str] | None:
    """Return the volume of a mounted model, without its name, and where it is mounted."""
    model = service.spec.model
    if model.scheme == "file":
        path = unquote(urlsplit(model.uri).path)
        return {"hostPath": {"path": path, "type": "Directory"}}, path
    if model.scheme == "pvc":
        claim = _rest(model).partition("/")[0]
        volume = {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        return volume, f"/models/{claim}"
    if model.scheme == "oci":
        image = {"reference": _rest(model), "pullPolicy": service.spec.image.pull_policy}
        return {"image": image}, _IMAGE_MOUNT
    return None


def _s3_query(model: Model) -> str:
    if model.s3 is None:
        return urlencode({"region": "us-east-1"})
    endpoint = {} if model.s3.endpoint is None else {"endpoint": model.s3.endpoint.rstrip("/")}
    return urlencode({"region": model.s3.region, **endpoint})


def _rest(model: Model) -> str:
    return model.uri.partition("://")[2]


def _mount(name: str, path: str) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True}
