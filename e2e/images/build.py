"""The images of this tree."""

from __future__ import annotations

import configparser
import shutil
import ssl
import tempfile
from pathlib import Path

from e2e.cluster import cache, oci
from e2e.cluster.errors import NotOnThisMachineError
from e2e.cluster.process import run
from e2e.cluster.settings import CACHE
from e2e.images import base, buildah

ROOT = Path(__file__).parents[2]
COMPONENTS = ("operator", "router", "runtime")
VERSION = "0.1.0"
PYTHON_IMAGE = "docker.io/penstock-e2e/python:1"
"""The base image under a name for test pods."""
_PASSED_ON = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout")
"""Settings of pip that mean the same in a container; others name files of this machine."""


def name(component: str) -> str:
    """Return the name of a component's image, as containerd keeps it."""
    return f"docker.io/penstock/{component}:{VERSION}"


def build_all() -> list[oci.Image]:
    """Build what changed (minutes the first time, seconds after a change of code); return all."""
    with cache.locked("build"):
        buildah.clean()
        below = base.ensure()
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            secrets = _index_settings(Path(folder))
            for component in COMPONENTS:
                print(f"building {name(component)}", flush=True)
                buildah.build(
                    buildah.Build(
                        name=name(component),
                        dockerfile=ROOT / component / "Dockerfile",
                        context=ROOT,
                        arguments={"BASE": below},
                        secrets=secrets,
                    )
                )
        exported = [buildah.export(each) for each in (below, *map(name, COMPONENTS))]
        buildah.prune(exported)
    python, *own = exported
    return [oci.Image(PYTHON_IMAGE, python.layout, python.digest), *own]


def _index_settings(folder: Path) -> dict[str, Path]:
    """Return pip.conf and the certificates that this machine reaches its package index with."""
    settings = _pip_settings()
    config = configparser.RawConfigParser()
    config["global"] = {key: settings[key] for key in _PASSED_ON if key in settings}
    certificates = settings.get("cert") or ssl.get_default_verify_paths().cafile
    secrets = {"pip.conf": folder / "pip.conf"}
    if certificates:
        config["global"]["cert"] = "/run/secrets/ca.crt"
        secrets["ca.crt"] = Path(certificates)
    with secrets["pip.conf"].open("w", encoding="utf-8") as file:
        config.write(file)
    return secrets


def _pip_settings() -> dict[str, str]:
    """Return pip's settings on this machine, those of the environment over those of files."""
    pip = shutil.which("pip") or shutil.which("pip3")
    if pip is None:
        raise NotOnThisMachineError("pip is missing: its settings say where packages come from")
    found: dict[str, str] = {}
    for line in run(pip, "config", "list").splitlines():
        key, _, value = line.partition("=")
        found[key.partition(".")[2]] = value.strip("'\"")
    return found
