"""The part of FlashInfer that is used, as a type, and loading it.

FlashInfer has no type annotations that can be checked from outside, and no build for machines
without CUDA. The protocols below are its interface as of 0.7.2: our calls are checked against them,
and so is the stand-in of the tests. `tests/gpu` compares them with the package itself.

It compiles kernels when they are first asked for, with nvcc, and keeps them in a cache below HOME.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from penstock_runtime.errors import ConfigurationError

if TYPE_CHECKING:
    import torch


class DecodeWrapper(Protocol):
    """Attention of one query a sequence: BatchDecodeWithPagedKVCacheWrapper."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        """Prepare `run` for a batch. The int32 page table may be in host memory."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        """Return `out`, (sequences, query heads, head_dim)."""


class PrefillWrapper(Protocol):
    """Attention of several queries a sequence: BatchPrefillWithPagedKVCacheWrapper."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        """Prepare `run` for a batch; causal: a chunk's last query sees all keys."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        """Return `out`, (tokens, query heads, head_dim)."""


class FlashInfer(Protocol):
    """The package. Every function but a wrapper's `plan` can be captured in a CUDA graph."""

    def BatchDecodeWithPagedKVCacheWrapper(  # noqa: N802 - a class there
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> DecodeWrapper:
        """With use_cuda_graph the batch size is that of the buffers, into which `plan` copies."""
        ...

    def BatchPrefillWithPagedKVCacheWrapper(  # noqa: N802 - a class there
        self, float_workspace_buffer: torch.Tensor, kv_layout: str, *, backend: str = "auto"
    ) -> PrefillWrapper:
        """Wrappers may share a workspace if they run one after another."""
        ...

    def append_paged_kv_cache(
        self,
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str,
    ) -> None:
        """Write keys and values, (tokens, kv_heads, head_dim), into pages. All int32, on device."""

    # Names as in the package: they may be given by keyword.
    def rmsnorm(self, input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: A002
        """Normalise the last dimension of a tensor of 2 or 3 dimensions."""
        ...

    def silu_and_mul(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Return silu(first half) · second half of the last dimension."""
        ...

    def apply_rope_with_cos_sin_cache_inplace(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        head_size: int,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
    ) -> None:
        """Turn query and key; is_neox=False pairs neighbouring elements. The cache is float32."""


def load_flashinfer() -> FlashInfer:
    """Return the package. Raises ConfigurationError if it is not there or does not load."""
    try:
        import flashinfer  # noqa: PLC0415 - heavy, and only where there is a GPU
    except ImportError as error:
        raise ConfigurationError(
            "FlashInfer, which computes on CUDA, cannot be loaded: install penstock's `gpu` extra "
            f"(pip install 'penstock[gpu]'), or use --device cpu ({error})"
        ) from error
    return cast("FlashInfer", flashinfer)
