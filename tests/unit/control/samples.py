"""Manifests that tests begin from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from penstock_operator.loader import load_manifest, parse_manifest

if TYPE_CHECKING:
    from penstock_operator.api import InferenceService

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "crds" / "samples").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden"
TABLE = yaml.safe_load((Path(__file__).parent / "table_of_manifests.yaml").read_text())
"""Good and bad manifests, and the sentences by which they are refused."""


def sample(name: str) -> InferenceService:
    return load_manifest((ROOT / "crds" / "samples" / f"{name}.yaml").read_text(), source=name)


def service(**spec: Any) -> InferenceService:
    """Return a service with this spec over a model."""
    return parse_manifest(
        {
            "apiVersion": "penstock.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat"},
            "spec": {"model": {"uri": "file:///models/tiny"}, **spec},
        }
    )
