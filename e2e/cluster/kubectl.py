"""kubectl, as the cluster's administrator."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from e2e.cluster.errors import ProgramFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kubectl:
    """Runs commands of kubectl."""

    program: Path
    kubeconfig: Path

    def __call__(
        self, *arguments: str, stdin: str | None = None, check: bool = True, seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run one command.

        Raises:
            ProgramFailedError: it failed and `check` is true, or was not done in time.
        """
        command = [str(self.program), *arguments]
        try:
            done = subprocess.run(
                command,
                input=stdin,
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = f"kubectl {' '.join(arguments)}: not done after {seconds:g} s"
            raise ProgramFailedError(said) from error
        if check and done.returncode:
            raise ProgramFailedError(
                f"kubectl {' '.join(arguments)}: exit {done.returncode}: "
                f"{done.stderr.strip() or done.stdout.strip()}"
            )
        return done

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects on the server. Raises ProgramFailedError."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def get(self, *arguments: str) -> Any:
        """Return what `get -o json` with these arguments says. Raises ProgramFailedError."""
        return json.loads(self("get", "-o", "json", *arguments).stdout)
