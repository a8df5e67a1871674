"""When a process wakes though nothing has happened: at the same moments for all that recurs.

Waking costs more than what it is for: some 0.2 ms for an event loop that finds the caches full of
weights, in every process, on the cores that compute.
"""

from __future__ import annotations

import asyncio


def until_next(seconds: float) -> float:
    """Return the time to the next multiple of `seconds` on the event loop's clock, above 0.

    What sleeps for so long wakes together with all that does, and whose `seconds` divide its own.
    """
    return seconds - asyncio.get_running_loop().time() % seconds
