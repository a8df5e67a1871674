"""What a worker on CUDA does between loading and serving: memory, kernels, graphs.

All of it runs on the compute thread, and all of it fails with cause and remedy: a GPU that is too
small or lacks a compiler is found at start, not by the first long prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import Segment
from penstock_runtime.attention.flashinfer import FlashInferAttention
from penstock_runtime.engine.cuda_graphs import DecodeGraphs
from penstock_runtime.engine.graph_sizes import graph_sizes
from penstock_runtime.engine.runner import forward
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_runtime.engine.cuda_graphs import Capture, Progress
    from penstock_runtime.kvcache.tensors import PoolTensor
    from penstock_runtime.model.transformer import Transformer
    from penstock_runtime.worker.settings import KvMemory


def count_pages(memory: KvMemory, free: Callable[[], int], page_bytes: int) -> int:
    """Return how many pages the memory holds, of `page_bytes` in all ranks together.

    `free` tells what the weights leave of the devices. Raises ConfigurationError.
    """
    pages = memory.of(free) // page_bytes
    if pages < 2:
        raise ConfigurationError(
            f"--kv-memory {memory} holds {pages} pages of {page_bytes} bytes: give it more, "
            "or lower --page-size"
        )
    return pages


def warm_up(model: Transformer, pool: PoolTensor, *, tokens: int, embed: bool, head: bool) -> None:
    """Compute a step of `tokens` tokens, at least 2, over pages that nobody uses yet.

    So kernels are compiled and loaded, and the largest step is known to fit. Raises
    ConfigurationError if it does not, or kernels cannot be built.
    """
    remedy = "lower --max-chunk-tokens (chunkedPrefill.maxTokens) or --kv-memory (kvCache.memory)"
    with out_of_memory(f"A step of {tokens} tokens", remedy):
        try:
            _step(model, pool, tokens, embed=embed, head=head)
        except (RuntimeError, OSError) as error:
            ours = isinstance(model.attention, FlashInferAttention)
            if isinstance(error, torch.OutOfMemoryError) or not ours:
                raise
            raise ConfigurationError(
                "the model cannot be computed by FlashInfer here. It compiles kernels at first use "
                "and needs nvcc of the CUDA toolkit (on PATH or below CUDA_HOME), a C++ compiler "
                f"and a HOME that can be written: {error}"
            ) from error


def _step(model: Transformer, pool: PoolTensor, tokens: int, *, embed: bool, head: bool) -> None:
    page_size = pool.layout.page_size
    segments = [
        Segment(start=0, length=1, pages=(0,)),
        Segment(start=0, length=tokens - 1, pages=(0,) * pages_for(tokens - 1, page_size)),
    ]
    hidden = forward(model, pool, _zeros(model, tokens, embed=embed), segments, None)
    if head:
        model.logits(hidden[:1])


def _zeros(model: Transformer, tokens: int, *, embed: bool) -> torch.Tensor:
    if embed:
        return model.embed(torch.zeros(tokens, dtype=torch.int64, device=model.device))
    width = model.config.hidden_size
    return torch.zeros(tokens, width, dtype=model.dtype, device=model.device)


def capture_graphs(
    model: Transformer,
    pool: PoolTensor,
    *,
    max_batch: int,
    max_tokens: int,
    capture: Capture,
    progress: Progress,
) -> DecodeGraphs | None:
    """Return the model's decode step as graphs; they take the pool's last page.

    None with an attention that cannot be captured: torch's own, for float32.
    """
    if not isinstance(model.attention, FlashInferAttention):
        return None
    with out_of_memory("CUDA graphs", "lower --kv-memory (kvCache.memory) or --max-batch"):
        return DecodeGraphs(
            model,
            model.attention,
            pool,
            sizes=graph_sizes(max_batch),
            max_tokens=max_tokens,
            capture=capture,
            progress=progress,
        )
