"""Waiting for what says nothing when it happens: look again and again, with a deadline."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from e2e.cluster.errors import NotInTimeError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(what: str, look: Callable[[], T | None], *, seconds: float, every: float = 0.2) -> T:
    """Return what `look` returns once that is neither None nor False.

    Args:
        what: For the error, such as "node1 is Ready".
        look: Asked every `every` seconds. It may raise AssertionError to say what is still wrong.
        seconds: The deadline.
        every: Seconds between two looks.

    Raises:
        NotInTimeError: it never did; the message has the last AssertionError.
    """
    deadline = time.monotonic() + seconds
    while True:
        last = ""
        try:
            found = look()
        except AssertionError as error:
            found, last = None, str(error)
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise NotInTimeError(f"waited {seconds:g} s in vain for this: {what}. {last}".rstrip())
        time.sleep(every)
