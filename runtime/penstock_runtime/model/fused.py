"""Kernels that do in one pass what takes torch several, on devices that have them.

`operators` makes layers of them, and what lies before attention asks the `AttentionStep` for them;
None means torch's own operations, which are the definition. Results differ by rounding: these keep
16 bits between norm and rotation, as Hugging Face does, and torch's path float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from penstock_runtime.flashinfer_library import load_flashinfer

if TYPE_CHECKING:
    from penstock_runtime.flashinfer_library import FlashInfer
    from penstock_runtime.model.rope import RopeTable


class FusedKernels(Protocol):
    """What layers ask for. Shapes as in `layers`; tensors of 16 bits."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the RMS norm over the last dimension of x, of 2 or 3 dimensions."""
        ...

    def rotate_(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, table: RopeTable) -> None:
        """Turn every pair of q and k in place, pairs side by side."""

    def gate(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up, (T, F)."""
        ...


def fused_kernels(dtype: torch.dtype, device: torch.device) -> FusedKernels | None:
    """Return the kernels for a model computed in `dtype` on `device`; None: torch's own.

    Raises ConfigurationError where they belong to the device and are not installed.
    """
    if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16}:
        return None
    return FlashInferKernels(load_flashinfer())


class FlashInferKernels:
    """FlashInfer's norm, rotation and activation. All can be captured in a CUDA graph."""

    def __init__(self, library: FlashInfer) -> None:
        self._library = library

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `FusedKernels`."""
        return self._library.rmsnorm(x, weight, eps)

    def rotate_(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, table: RopeTable) -> None:
        """See `FusedKernels`."""
        self._library.apply_rope_with_cos_sin_cache_inplace(
            table.rows, q_TNH, k_TKH, q_TNH.shape[-1], table.cos_sin, is_neox=False
        )

    def gate(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """See `FusedKernels`."""
        return self._library.silu_and_mul(gate_up_T2F)
