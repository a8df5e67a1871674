"""What layers are made of: torch's operators, a GPU's kernels, or the C++ kernels for the CPU.

All compute the same formulas. The C++ kernels take and give float32, keep bfloat16 weights as they
are in memory, and are batch-invariant (see `kernels`); torch's run on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from penstock_runtime.kernels.layers import Projection
from penstock_runtime.model.linear import compute_dtype, make_linear

if TYPE_CHECKING:
    from penstock_runtime.kernels.native import Kernels
    from penstock_runtime.model.fused import FusedKernels
    from penstock_runtime.model.linear import Linear


class Norm(Protocol):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __call__(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of x's shape."""


class Operators(Protocol):
    """Makes layers of weights in the model's dtype; activations have `compute_dtype`."""

    compute_dtype: torch.dtype

    def linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
        """Return a linear layer."""

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        """Return an RMS norm."""

    def silu_multiply(self, gate_up_MF: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up, (M, F), of gate and up side by side, (M, 2·F)."""


def create_operators(
    kernels: Kernels | None, fused: FusedKernels | None, dtype: torch.dtype, device: torch.device
) -> Operators:
    """Return the operators for a model of `dtype` on `device`: the kernels', if there are any."""
    if kernels is not None:
        return NativeOperators(kernels, dtype)
    if fused is not None:
        return FusedOperators(fused, dtype, device)
    return TorchOperators(dtype, device)


class TorchOperators:
    """torch's own, on any device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.compute_dtype = compute_dtype(dtype, device)

    def linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
        """Return a linear layer that computes in `compute_dtype`."""
        bias = None if bias_N is None else bias_N.to(self.compute_dtype)
        return make_linear(weight_NK.to(self.compute_dtype), bias)

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        """Return an RMS norm."""
        weight = weight_D.to(self.compute_dtype)
        return lambda x_MD: functional.rms_norm(x_MD, weight.shape, weight, eps)

    def silu_multiply(self, gate_up_MF: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up."""
        gate_MF, up_MF = gate_up_MF.chunk(2, dim=-1)
        return functional.silu(gate_MF).mul_(up_MF)


class FusedOperators(TorchOperators):
    """torch's matrix products, and a GPU's own kernels for the rest."""

    def __init__(self, fused: FusedKernels, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._fused = fused

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        """Return an RMS norm."""
        weight = weight_D.to(self.compute_dtype)
        return lambda x_MD: self._fused.norm(x_MD, weight, eps)

    def silu_multiply(self, gate_up_MF: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up."""
        return self._fused.gate(gate_up_MF)


class NativeOperators:
    """The C++ kernels, on the CPU."""

    compute_dtype = torch.float32

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        # A model of float32 stays one, also where products of bfloat16 would be faster.
        self._round_inputs = dtype == torch.bfloat16 and kernels.multiplies_bfloat16

    def linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
        """Return a linear layer over a packed copy of the weight."""
        return NativeLinear(self._kernels, weight_NK, bias_N, round_inputs=self._round_inputs)

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        """Return an RMS norm."""
        return NativeNorm(self._kernels, weight_D, eps)

    def silu_multiply(self, gate_up_MF: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up."""
        return self._kernels.silu_multiply(gate_up_MF)


class NativeNorm:
    """The kernels' RMS norm."""

    def __init__(self, kernels: Kernels, weight_D: torch.Tensor, eps: float) -> None:
        self._kernels = kernels
        self.weight_D = weight_D.float().contiguous()
        self._eps = eps

    def __call__(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of x's shape."""
        return self._kernels.rms_norm(x_MD, self.weight_D, self._eps)


class NativeLinear:
    """The kernels' matrix product."""

    def __init__(
        self,
        kernels: Kernels,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        *,
        round_inputs: bool,
    ) -> None:
        self._kernels = kernels
        self.projection = Projection(
            kernels.pack(weight_NK, round_inputs=round_inputs),
            None if bias_N is None else bias_N.float().contiguous(),
        )

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """Return (M, N) for x (M, K), float32."""
        return self._kernels.linear(x_MK, self.projection.weight, self.projection.bias)

    def add_to(self, y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
        """Add the product to y."""
        self._kernels.linear(x_MK, self.projection.weight, self.projection.bias, add_to=y_MN)
