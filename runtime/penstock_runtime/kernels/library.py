"""Finds the library that was compiled for this processor, checks it, and loads it."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from penstock_runtime.errors import PenstockRuntimeError
from penstock_runtime.kernels.build import Level, levels, source_digest

_REBUILD = "run `python -m penstock_runtime.kernels.build`"


class KernelsUnavailable(PenstockRuntimeError):  # noqa: N818 - it names the state
    """The kernels cannot be used in this process. Says why, and what would help."""


def usable_levels() -> list[Level]:
    """Return the levels of this processor, the fastest first; none if it is of an unknown kind."""
    capabilities = torch.cpu.get_capabilities()
    return [level for level in levels() if all(map(capabilities.get, level.capabilities))]


@cache
def load() -> tuple[Level, ctypes.CDLL]:
    """Return the library for this processor and its level.

    The choice follows from the processor's flags and the libraries that are there, never from a
    timing: all processes of a service on machines of one kind compute alike.

    Raises:
        KernelsUnavailable: there is no library, it was made from other sources than those beside
            it, or it cannot be loaded.
    """
    usable = usable_levels()
    if not usable:
        raise KernelsUnavailable("there are no kernels for this kind of processor")
    built = [level for level in usable if level.library.exists()]
    if not built:
        raise KernelsUnavailable(
            f"the kernels are not built ({usable[0].library} is missing): install a C++ compiler "
            f"and {_REBUILD}"
        )
    return built[0], _open(built[0])


def _open(level: Level) -> ctypes.CDLL:
    try:
        # Its OpenMP symbols are found in the runtime that torch has loaded for all.
        library = ctypes.CDLL(str(level.library))
        library.penstock_source_digest.restype = ctypes.c_char_p
        digest = library.penstock_source_digest().decode()
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{level.library} cannot be loaded: {error}") from error
    if digest != source_digest():
        raise KernelsUnavailable(
            f"{level.library} was made from other sources than those installed: {_REBUILD}"
        )
    return library
