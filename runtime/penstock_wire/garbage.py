"""Python's garbage collector, kept from what a process has for good."""

from __future__ import annotations

import gc


def keep_what_is_there() -> None:
    """Have the collector pass over every object that there is now. Call it when all is loaded.

    Libraries leave some 200,000 of them in a worker, and 60,000 in a router. To look through them
    takes 100 ms, again and again, in which every stream of the process stands still.
    """
    gc.collect()
    gc.freeze()
