"""Multiplying by a weight matrix with what torch has, and the dtype in which that is done.

This is the path without the C++ kernels (see `operators.py`). On the CPU the weight is brought once
into oneDNN's blocked layout: up to twice as fast as a plain matrix product for 2 to 32 rows, about
equal otherwise (measured with AVX2; with AVX-512 the gain is larger). The operators for that are
private to torch, so their use is confined to this file, tried out once a process on a small matrix,
and replaced by `torch.nn.functional.linear` where they are missing.

Every choice follows from the CPU's flags, the dtype and the build of torch, never from a timing:
processes on machines of one kind compute alike.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Protocol

import torch
from torch.nn import functional


class Linear(Protocol):
    """y = x · Wᵀ + b."""

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """Return (M, N) for x (M, K)."""

    def add_to(self, y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
        """Add the product to y, which is contiguous."""


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a model of `dtype` is computed on `device`.

    A CPU without instructions for bfloat16 or float16 matrix products is about six times as fast in
    float32. There weights and activations inside a stage are float32 (twice the memory for
    weights); KV and the activations that leave a stage keep `dtype`.
    """
    if device.type != "cpu" or dtype == torch.float32 or _multiplies_natively(dtype):
        return dtype
    return torch.float32


def make_linear(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
    """Return torch's fastest linear layer for a weight on its device and in its dtype."""
    if weight_NK.device.type == "cpu" and _packing_works(weight_NK.dtype):
        return PackedLinear(weight_NK, bias_N)
    return PlainLinear(weight_NK, bias_N)


class PlainLinear:
    """The matrix product that torch has for every device and dtype."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        self._weight = weight_NK.contiguous()
        self._bias = bias_N

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """Return (M, N) for x (M, K)."""
        return functional.linear(x_MK, self._weight, self._bias)

    def add_to(self, y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
        """Add the product to y, in one pass over it."""
        y_MN.addmm_(x_MK, self._weight.t())
        if self._bias is not None:
            y_MN += self._bias


class PackedLinear:
    """oneDNN's matrix product over a weight in its own blocked layout. CPU only."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)  # noqa: SLF001
        self._bias = bias_N
        self._product = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """Return (M, N) for x (M, K)."""
        product: torch.Tensor = self._product(x_MK, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
        """Add the product to y."""
        y_MN += self(x_MK)


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Try the private operators on a small matrix: they differ by torch build, CPU and dtype."""
    weight = torch.arange(64 * 32, dtype=torch.float32).reshape(64, 32).div(2048).to(dtype)
    x = torch.ones(2, 32, dtype=dtype)
    try:
        packed = PackedLinear(weight, None)(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(packed, functional.linear(x, weight), rtol=1e-2, atol=1e-2)


@cache
def _multiplies_natively(dtype: torch.dtype) -> bool:
    if platform.machine() in {"x86_64", "AMD64"}:
        # AVX-512 without its bfloat16 extension passes oneDNN's own check, but emulates.
        flags = torch.cpu.get_capabilities()
        wanted = (
            ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
        )
        return any(flags.get(flag, False) for flag in wanted)
    return _packing_works(dtype)
