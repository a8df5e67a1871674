"""Which attention backend a device gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.paged_cpu import PagedCpuAttention

if TYPE_CHECKING:
    import torch

    from penstock_runtime.attention.base import AttentionBackend

_BACKENDS: dict[str, type[AttentionBackend[Any]]] = {
    "cpu": PagedCpuAttention,
    "cuda": DenseAttention,
}


def create_attention(device: torch.device) -> AttentionBackend[Any]:
    """Return a new backend for `device`. Raises ValueError for a kind of device without one."""
    backend = _BACKENDS.get(device.type)
    if backend is None:
        raise ValueError(f"no attention backend for {device}; supported are {sorted(_BACKENDS)}")
    return backend()
