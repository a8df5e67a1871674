"""kopf's memory of objects, kept nowhere: event handlers need none.

By default kopf copies every object of every event to see what changed since its last annotation,
which was half of the operator's CPU time. These also make sure that it has nothing to write.
"""

from __future__ import annotations

from typing import Any

import kopf


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]  # its types are not read here
    """Finds no earlier state, and no difference."""

    def build(self, **_: Any) -> dict[str, Any]:
        """Return nothing of the object."""
        return {}

    def fetch(self, **_: Any) -> None:
        """Return no earlier state."""

    def store(self, **_: Any) -> None:
        """Keep nothing."""


class NoProgress(kopf.ProgressStorage):  # type: ignore[misc]  # likewise
    """Knows of no handler that is under way."""

    def fetch(self, **_: Any) -> None:
        """Return no progress."""

    def store(self, **_: Any) -> None:
        """Keep nothing."""

    def purge(self, **_: Any) -> None:
        """Nothing is kept."""

    def touch(self, **_: Any) -> None:
        """Write nothing."""

    def clear(self, *, essence: Any) -> Any:
        """Return what is given: nothing of ours is in it."""
        return essence
