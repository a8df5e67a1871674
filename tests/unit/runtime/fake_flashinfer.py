"""FlashInfer in torch, for machines without CUDA: the calls we make, with what they demand.

Each function refuses what the package refuses (dtypes, shapes, strides) and addresses pages as its
kernels do: by the strides of the tensor it is given, from the address of its first element.
"""

from __future__ import annotations

import torch


class RefusedError(ValueError):
    """The package would not take this."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise RefusedError(what)


class Pages:
    """K or V of one layer in layout HND, read by strides."""

    def __init__(self, cache: torch.Tensor) -> None:
        require(cache.dim() == 4, "a cache has 4 dimensions")
        require(cache.stride(3) == 1, "the last dimension must be dense")
        self.page_size = cache.shape[2]
        self._cache = cache
        end = sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True)) + 1
        self._flat = cache.as_strided((end,), (1,))
        self._head_dim = torch.arange(cache.shape[3])

    def at(self, pages: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Return the offsets of tokens' elements, (tokens, heads, head_dim)."""
        page, head, entry, _ = self._cache.stride()
        heads = torch.arange(self._cache.shape[1]) * head
        tokens = pages.long() * page + entries.long() * entry
        return tokens[:, None, None] + heads[None, :, None] + self._head_dim

    def write(self, offsets: torch.Tensor, x: torch.Tensor) -> None:
        self._flat[offsets] = x

    def read(self, offsets: torch.Tensor) -> torch.Tensor:
        return self._flat[offsets]


def unpack(paged_kv_cache: torch.Tensor, layout: str) -> tuple[Pages, Pages]:
    require(layout == "HND", "only this layout is used")
    require(paged_kv_cache.dim() == 5 and paged_kv_cache.shape[1] == 2, "(pages, 2, K, S, H)")
    k, v = paged_kv_cache.unbind(dim=1)
    require(k.stride() == v.stride(), "K/V strides must be identical")
    require(max(k.stride()) < 2**32, "strides have 32 bits")
    return Pages(k), Pages(v)


def check_table(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        require(tensor.dtype == torch.int32, "page tables are int32")
        require(tensor.dim() == 1 and tensor.is_contiguous(), "page tables are dense vectors")


class _Wrapper:
    """What both wrappers do: hold a page table, and attend."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        require(float_workspace_buffer.dtype == torch.uint8, "a workspace is bytes")
        self._layout = kv_layout
        self._table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._dtype = torch.float32
        self._scale = 1.0
        self._shape = (0, 0, 0, 0)

    def _set(
        self,
        table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        shape: tuple[int, int, int, int],
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        check_table(*table)
        indptr, indices, last_page_len = table
        require(len(indptr) == len(last_page_len) + 1, "indptr has one more than sequences")
        require(int(indptr[0]) == 0 and int(indptr[-1]) == len(indices), "indptr spans the pages")
        page_size = shape[3]
        require(bool((last_page_len >= 1).all()), "a last page holds a token")
        require(bool((last_page_len <= page_size).all()), "a last page holds no more than a page")
        require(shape[0] % shape[1] == 0, "query heads are a multiple of KV heads")
        require(q_data_type == kv_data_type, "queries have the dtype of pages here")
        self._table, self._shape = table, shape
        self._dtype, self._scale = q_data_type, sm_scale

    def _attend(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attend; sequence i has the rows [rows[i], rows[i + 1]), which are its last tokens."""
        assert self._table is not None, "run before plan"
        heads, kv_heads, head_dim, page_size = self._shape
        require(q.dtype == self._dtype == paged_kv_cache.dtype, "dtypes as planned")
        require(q.stride(-1) == 1 and out.is_contiguous(), "dense queries and output")
        require(q.shape == out.shape == (int(rows[-1]), heads, head_dim), "q and out as planned")
        k_pages, v_pages = unpack(paged_kv_cache, self._layout)
        require(k_pages.page_size == page_size, "the page size as planned")
        indptr, indices, last_page_len = self._table
        for i in range(len(last_page_len)):
            pages = indices[indptr[i] : indptr[i + 1]]
            tokens = (len(pages) - 1) * page_size + int(last_page_len[i])
            at = torch.arange(tokens)
            offsets = k_pages.at(pages[at // page_size], at % page_size)
            k, v = (
                x.read(offsets).float().repeat_interleave(heads // kv_heads, dim=1)
                for x in (k_pages, v_pages)
            )
            first, last = int(rows[i]), int(rows[i + 1])
            scores = torch.einsum("mnh,lnh->nml", q[first:last].float(), k) * self._scale
            positions = torch.arange(tokens - (last - first), tokens)
            scores = scores.masked_fill(at > positions[:, None], -torch.inf)
            out[first:last] = torch.einsum("nml,lnh->mnh", scores.softmax(-1), v).to(out.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
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
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        require(backend in {"auto", "fa2"}, "backends that are the same to us")
        self._use_tensor_cores = use_tensor_cores
        self._buffers = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self._buffers = (
                paged_kv_indptr_buffer,
                paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer,
            )
            check_table(*self._buffers)
            require(
                len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1,
                "paged_kv_indptr_buffer should be batch_size + 1",
            )

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
        group = num_qo_heads // num_kv_heads
        require(self._use_tensor_cores or group in {1, 2, 3, 4, 6, 8, 16}, "unsupported group_size")
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        table = (indptr, indices, last_page_len)
        self._set(table, shape, q_data_type, kv_data_type, sm_scale)
        if self._buffers is None:
            # The package copies to the device: what the caller does with its own is its business.
            self._table = (indptr.clone(), indices.clone(), last_page_len.clone())
            return
        require(len(last_page_len) == len(self._buffers[2]), "the batch size is fixed")
        require(len(indices) <= len(self._buffers[1]), "indices do not fit the allocated buffer")
        for buffer, tensor in zip(self._buffers, table, strict=True):
            buffer[: len(tensor)].copy_(tensor)
        self._table = self._buffers

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        assert self._table is not None, "run before plan"
        return self._attend(q, torch.arange(len(self._table[2]) + 1), paged_kv_cache, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str, *, backend: str = "auto"
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        require(backend == "auto", "a backend that is the same to us")
        self._rows = torch.zeros(1, dtype=torch.int32)

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
        require(causal, "chunks are causal")
        check_table(qo_indptr)
        require(len(qo_indptr) == len(paged_kv_indptr), "as many chunks as sequences")
        table = (paged_kv_indptr.clone(), paged_kv_indices.clone(), paged_kv_last_page_len.clone())
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._set(table, shape, q_data_type, kv_data_type, sm_scale)
        self._rows = qo_indptr.clone()

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(q, self._rows, paged_kv_cache, out)


def append_paged_kv_cache(
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
    check_table(batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    k_pages, v_pages = unpack(paged_kv_cache, kv_layout)
    tokens = len(append_key)
    require(len(batch_indices) == len(positions) == tokens, "a place for each token")
    require(len(kv_indptr) == len(kv_last_page_len) + 1, "indptr has one more than sequences")
    size = k_pages.page_size
    slots = kv_indptr[batch_indices.long()].long() * size + positions
    page, entry = kv_indices[slots // size], slots % size
    for pages, x in ((k_pages, append_key), (v_pages, append_value)):
        require(x.stride(-1) == 1, "the last dimension must be dense")
        require(x.dtype == paged_kv_cache.dtype, "bytes are copied, not converted")
        pages.write(pages.at(page, entry), x)


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: A002
    require(input.dim() in {2, 3} and input.stride(-1) == 1, "2 or 3 dimensions, the last dense")
    require(input.dtype == weight.dtype, "one dtype")
    x = input.float()
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normal * weight.float()).to(input.dtype)


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:  # noqa: A002
    gate, up = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    require(cos_sin_cache.dtype == torch.float32, "cos_sin_cache should be float32")
    require(cos_sin_cache.is_contiguous() and positions.is_contiguous(), "dense tables")
    require(not is_neox, "pairs lie side by side")
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    for x in (query, key):
        # A view or an error: in place means the caller's memory.
        heads = x.view(x.shape[0], -1, head_size)
        even, odd = heads.float().clone().unflatten(-1, (-1, 2)).unbind(-1)
        heads[..., ::2] = (even * cos[:, None] - odd * sin[:, None]).to(x.dtype)
        heads[..., 1::2] = (odd * cos[:, None] + even * sin[:, None]).to(x.dtype)
