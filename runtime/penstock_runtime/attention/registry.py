"""Which attention backend a device gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.paged_cpu import PagedCpuAttention
from penstock_runtime.attention.paged_native import PagedNativeAttention

if TYPE_CHECKING:
    import torch

    from penstock_runtime.attention.base import AttentionBackend
    from penstock_runtime.kernels.native import Kernels

_BACKENDS: dict[str, type[AttentionBackend[Any]]] = {
    "cpu": PagedCpuAttention,
    "cuda": DenseAttention,
}


def create_attention(device: torch.device, kernels: Kernels | None) -> AttentionBackend[Any]:
    """Return a new backend for `device`, that of the C++ kernels if there are any.

    Raises ValueError for a kind of device without one.
    """
    if kernels is not None:
        return PagedNativeAttention(kernels)
    backend = _BACKENDS.get(device.type)
    if backend is None:
        raise ValueError(f"no attention backend for {device}; supported are {sorted(_BACKENDS)}")
    return backend()
