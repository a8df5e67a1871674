"""Tells how far pods are while a service starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_operator.local.logs import Terminal
    from penstock_operator.observed import Pod

_STEP = 0.1
"""Share of the work between two lines about the same thing."""


class ProgressTeller:
    """Prints a line when a pod says something new, is a step further, or changes its state."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._told: dict[str, tuple[str, str, int]] = {}

    def tell(self, pods: Sequence[Pod]) -> None:
        """Print what is new since the last call. Crashes are told where they are seen."""
        for pod in pods:
            message = pod.message if pod.state == "starting" and not pod.fault else ""
            now = (pod.state, message.partition(":")[0], int(pod.progress / _STEP))
            if self._told.get(pod.name) == now:
                continue
            before = self._told.get(pod.name, ("", "", 0))
            self._told[pod.name] = now
            if pod.state == "starting" and message and pod.progress:
                self._terminal.say(f"{pod.name}: {pod.story}")
            elif pod.state in ("ready", "draining") and before[0] != pod.state:
                self._terminal.say(f"{pod.name}: {pod.state}")
