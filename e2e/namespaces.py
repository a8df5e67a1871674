"""Namespaces for tests: new ones, deleted with everything in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from e2e.cluster.errors import ClusterError
from e2e.cluster.waiting import until

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl

_DELETE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Makes namespaces and deletes them at its end."""

    kubectl: Kubectl
    _made: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def create(self, purpose: str) -> str:
        """Return a new namespace named after `purpose`, such as the name of a test."""
        words = re.sub("[^a-z0-9]+", "-", purpose.lower().removeprefix("test_")).strip("-")
        taken = {item["metadata"]["name"] for item in self.kubectl.get("namespaces")["items"]}
        base = words[:40].strip("-")
        names = [base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))]
        name = next(name for name in names if name not in taken)
        self.kubectl("create", "namespace", name)
        until(
            f"namespace {name} has a ServiceAccount",
            lambda: (
                not self.kubectl(
                    "get", "serviceaccount", "default", "--namespace", name, check=False
                ).returncode
            ),
            seconds=30,
        )
        self._made.append(name)
        return name

    def __exit__(self, *_: object) -> None:
        """Delete all that were made. Raises ClusterError naming what does not go."""
        for name in self._made:
            self.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")
        for name in self._made:
            self._wait_until_gone(name)

    def _wait_until_gone(self, name: str) -> None:
        timeout = f"--timeout={_DELETE_SECONDS}s"
        done = self.kubectl(
            "wait", "--for=delete", f"namespace/{name}", timeout, check=False, seconds=300
        )
        if done.returncode and "not found" not in done.stderr.lower():
            left = self.kubectl("get", "all", "--namespace", name, "-o", "wide", check=False)
            raise ClusterError(f"namespace {name} does not go; in it are:\n{left.stdout}")
