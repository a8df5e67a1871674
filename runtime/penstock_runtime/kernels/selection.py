"""Which kernels a process computes with: the library's, or torch's own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kernels.library import KernelsUnavailable
from penstock_runtime.kernels.native import Kernels

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KernelChoice: TypeAlias = Literal["auto", "native", "torch"]
"""auto: the library where it can be used, else torch; native: the library or nothing."""


def select_kernels(choice: KernelChoice, device: torch.device) -> Kernels | None:
    """Return the library's kernels, or None for torch's, and log which and why.

    Raises ConfigurationError if `choice` is native and they cannot be used.
    """
    if choice == "torch":
        log.info("kernels: torch's, as asked for")
        return None
    if device.type != "cpu":
        if choice == "native":
            raise ConfigurationError(
                f"--kernels native is for the CPU, not {device.type}: leave it out"
            )
        log.info("kernels: torch's, on %s", device.type)
        return None
    try:
        kernels = Kernels()
    except KernelsUnavailable as error:
        if choice == "native":
            raise ConfigurationError(f"--kernels native: {error}") from error
        log.warning("kernels: torch's, slower: %s", error)
        return None
    log.info("kernels: our own, compiled for %s", kernels.level)
    return kernels
