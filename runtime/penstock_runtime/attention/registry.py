"""Which attention backend a device gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from penstock_runtime.attention import flashinfer
from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.paged_cpu import PagedCpuAttention
from penstock_runtime.attention.paged_native import PagedNativeAttention
from penstock_runtime.flashinfer_library import load_flashinfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.attention.base import AttentionBackend, AttentionShape
    from penstock_runtime.kernels.native import Kernels


def _cpu(_shape: AttentionShape, _device: torch.device) -> AttentionBackend[Any]:
    return PagedCpuAttention()


def _cuda(shape: AttentionShape, device: torch.device) -> AttentionBackend[Any]:
    if shape.dtype not in flashinfer.DTYPES:
        return DenseAttention()  # exact, for float32: tensor cores have no kernel for it
    flashinfer.check_supported(shape, torch.cuda.get_device_capability(device))
    return flashinfer.FlashInferAttention(load_flashinfer(), shape, device)


_BACKENDS: dict[str, Callable[[AttentionShape, torch.device], AttentionBackend[Any]]] = {
    "cpu": _cpu,
    "cuda": _cuda,
}


def create_attention(
    device: torch.device, shape: AttentionShape, kernels: Kernels | None = None
) -> AttentionBackend[Any]:
    """Return a new backend for models of `shape` on `device`: the C++ kernels' if there are any.

    Raises ConfigurationError if what a device of this kind needs is missing, or has no kernel for
    the shape, ValueError for a kind of device without a backend.
    """
    if kernels is not None:
        return PagedNativeAttention(kernels)
    create = _BACKENDS.get(device.type)
    if create is None:
        raise ValueError(f"no attention backend for {device}; supported are {sorted(_BACKENDS)}")
    return create(shape, device)
