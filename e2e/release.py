"""The operator as Helm installs it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from e2e.cluster.errors import ProgramFailedError
from e2e.cluster.waiting import until
from e2e.images.build import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.cluster import Cluster

NAME = "penstock"
NAMESPACE = "penstock-system"
_CHART = ROOT / "charts" / "penstock"
_INSTALL_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Release:
    """The chart's release in its namespace."""

    cluster: Cluster

    def install(self, **values: Any) -> None:
        """Install it, or upgrade it to the chart of this tree, and wait until it is ready."""
        self.helm(
            *("upgrade", NAME, str(_CHART), "--install", "--create-namespace", "--wait"),
            *(f"--set-json={key}={json.dumps(value)}" for key, value in values.items()),
            f"--timeout={_INSTALL_SECONDS}s",
        )
        self.restart()

    def uninstall(self) -> None:
        """Remove it. The CRDs and the services stay, as the chart promises."""
        self.helm("uninstall", NAME, "--wait", f"--timeout={_INSTALL_SECONDS}s")
        # Helm waits for the Deployment, not for its pods.
        self.cluster.kubectl(
            "wait", "--for=delete", "pods", *self._selected(), f"--timeout={_INSTALL_SECONDS}s"
        )

    def helm(self, *arguments: str) -> str:
        """Run helm in the release's namespace. Raises ProgramFailedError."""
        done = subprocess.run(
            [str(self.cluster.programs.helm), "--namespace", NAMESPACE, *arguments],
            env={**os.environ, "KUBECONFIG": str(self.cluster.settings.kubeconfig)},
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS + 60,
            check=False,
        )
        if done.returncode:
            raise ProgramFailedError(
                f"helm {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}\n"
                f"{self.logs()}"
            )
        return done.stdout

    @property
    def pods(self) -> list[str]:
        """Names of the operator's pods."""
        found = self.cluster.kubectl.get("pods", *self._selected())
        return [pod["metadata"]["name"] for pod in found["items"]]

    def restart(self) -> None:
        """Replace its pods and wait for the new ones: a rebuilt image has the same tag."""
        deployment = ("deployment", "--selector", f"app.kubernetes.io/instance={NAME}")
        namespace = ("--namespace", NAMESPACE)
        self.cluster.kubectl("rollout", "restart", *deployment, *namespace)
        self.cluster.kubectl(
            *("rollout", "status", *deployment, *namespace, f"--timeout={_INSTALL_SECONDS}s"),
            seconds=_INSTALL_SECONDS + 30,
        )

    def kill(self) -> None:
        """End the operator at once, as a crash of its node does, and let it be started again."""
        arguments = ("--grace-period=0", "--force", "--wait=false")
        self.cluster.kubectl("delete", "pods", *self._selected(), *arguments)

    def scale(self, replicas: int) -> None:
        """Run so many copies; 0 takes it out of service. Waits until that is so."""
        self.cluster.kubectl(
            *("scale", "deployment", "--selector", f"app.kubernetes.io/instance={NAME}"),
            *("--namespace", NAMESPACE, f"--replicas={replicas}"),
        )
        until(
            f"{replicas} pods of the operator run",
            lambda: len(self._ready()) == replicas == len(self.pods),
            seconds=_INSTALL_SECONDS,
        )

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Take it out of service while the context lasts."""
        self.scale(0)
        try:
            yield
        finally:
            self.scale(1)

    def logs(self) -> str:
        """Return the end of its log."""
        arguments = ("--all-containers", "--tail=40", "--prefix")
        return self.cluster.kubectl("logs", *self._selected(), *arguments, check=False).stdout

    def _ready(self) -> list[str]:
        found = self.cluster.kubectl.get("pods", *self._selected())["items"]
        return [
            pod["metadata"]["name"]
            for pod in found
            if any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in pod["status"].get("conditions", [])
            )
        ]

    @staticmethod
    def _selected() -> tuple[str, ...]:
        selector = f"app.kubernetes.io/name=penstock-operator,app.kubernetes.io/instance={NAME}"
        return "--namespace", NAMESPACE, "--selector", selector
