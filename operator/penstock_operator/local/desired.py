"""What is wanted of a local service, as commands write it and the supervisor reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from penstock_operator import labels, manifests, podspec
from penstock_operator.errors import ManifestError, Problem, StateError
from penstock_operator.loader import dump_manifest, parse_manifest
from penstock_operator.observed import Target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from penstock_operator.api import InferenceService, RoleSpec
    from penstock_operator.labels import Role
    from penstock_operator.local.state import StateDir


@dataclass(frozen=True, kw_only=True, slots=True)
class Desired:
    """A manifest, and what `penstock scale` has said since it was applied."""

    manifest: InferenceService
    scaled: Mapping[Role, int]
    generation: int
    """Rises with every change."""

    @property
    def service(self) -> InferenceService:
        """The manifest with the scaling put in; nothing sleeps on one machine."""
        service = _awake(self.manifest)
        for role, replicas in self.scaled.items():
            service = service.scaled(role, replicas)
        return service

    def scale(self, role: Role, replicas: int) -> Desired:
        """Return this with other replicas of `role`. Raises ManifestError if it cannot be."""
        try:
            self.manifest.scaled(role, replicas)
            if replicas < 1:
                raise ValueError("at least 1 is needed; without it requests have no worker")
        except ValueError as error:
            raise ManifestError([Problem(role, str(error))], source="the scaling") from error
        return replace(self, scaled={**self.scaled, role: replicas}, generation=self.generation + 1)

    def apply(self, manifest: InferenceService) -> Desired:
        """Return this with another manifest. A scaling stays where autoscaling leaves it open."""
        kept = {}
        for role, replicas in self.scaled.items():
            part = manifest.spec.role(role)
            bounds = part.autoscaling if part else None
            if bounds and bounds.min_replicas <= replicas <= bounds.max_replicas:
                kept[role] = replicas
        return Desired(manifest=manifest, scaled=kept, generation=self.generation + 1)


def _awake(service: InferenceService) -> InferenceService:
    """Return the service without scaling to zero: here is nothing that would wake a role."""
    update: dict[str, RoleSpec] = {}
    for role in podspec.waking_roles(service):
        part = service.spec.role(role)
        if part is not None and part.autoscaling is not None:
            bounds = part.autoscaling.model_copy(update={"min_replicas": 1})
            update[role] = part.model_copy(update={"autoscaling": bounds})
    return service.model_copy(update={"spec": service.spec.model_copy(update=update)})


def read_desired(state: StateDir) -> Desired:
    """Return what is wanted. Raises StateError if the file is missing or not ours."""
    raw = state.read(state.desired_file)
    if not isinstance(raw, dict):
        raise StateError(f"{state.desired_file} is missing or not a map")
    try:
        return Desired(
            manifest=parse_manifest(raw["manifest"]),
            scaled={cast("Role", role): int(n) for role, n in raw["scaled"].items()},
            generation=int(raw["generation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ManifestError) as error:
        raise StateError(
            f"{state.desired_file} was not written by this release: {error}",
            remedy=f"stop the service with `penstock down --name {state.name}` and start it again",
        ) from error


def write_desired(state: StateDir, desired: Desired) -> None:
    """Put down what is wanted."""
    state.write(
        state.desired_file,
        {
            "generation": desired.generation,
            "manifest": dump_manifest(desired.manifest),
            "scaled": dict(desired.scaled),
        },
    )


def local_targets(service: InferenceService) -> dict[Role, Target]:
    """Return what each role should come to on one machine.

    One router is enough for one machine. A new one starts before the old one ends, as all roles do:
    they share the API's listening socket.
    """
    layout = manifests.layout(service)
    targets: dict[Role, Target] = {}
    for role in labels.ROLES:
        part = service.spec.role(role)
        if part is None:
            targets[role] = Target(replicas=0, revision="", layout=layout)
            continue
        targets[role] = Target(
            replicas=1 if role == "router" else part.wanted,
            revision=manifests.revision(service, role),
            layout=layout,
        )
    return targets


def api_key_file(state: StateDir, service: InferenceService) -> Path | None:
    """Return the file with the bearer key, None if the API is open."""
    secret = service.spec.router.api_key_secret
    return state.secrets / secret / labels.API_KEY_ENTRY if secret else None
