"""CUDA graphs for decode: embedding, layers and head of a batch, launched as one.

A decode step is some ten kernels a layer of a few microseconds each: launching them one by one
takes longer than running them. So the step is captured once for each batch size of a ladder
(`graph_sizes`) and replayed with new contents of the same memory: tokens, positions, page table.
Prefill and mixed batches run as they are.

Captured graphs share their memory, which is possible since one is replayed at a time, and each
leaves its logits in one common tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from penstock_runtime.engine.graph_sizes import padded, size_for
from penstock_runtime.kvcache.base import pages_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import Segment
    from penstock_runtime.attention.flashinfer import FixedDecode, FlashInferAttention
    from penstock_runtime.kvcache.tensors import PoolTensor
    from penstock_runtime.model.transformer import Transformer

Replay: TypeAlias = Callable[[], None]
Capture: TypeAlias = Callable[[Callable[[], None]], Replay]
"""Runs a function whose tensors do not move, and returns what runs it again."""
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (graphs captured, graphs in all)."""


@dataclass(frozen=True, slots=True)
class _Captured:
    plan: FixedDecode
    replay: Replay


class DecodeGraphs:
    """The decode step of one model over one pool, captured for several batch sizes.

    Args:
        model: with embedding and head.
        attention: the model's.
        pool: its last page is taken for padding: nobody else may use it.
        sizes: batch sizes, rising.
        max_tokens: of one sequence.
        capture: how a function is captured, see `cuda_capture`.
        progress: called after each size.
    """

    def __init__(
        self,
        model: Transformer,
        attention: FlashInferAttention,
        pool: PoolTensor,
        *,
        sizes: Sequence[int],
        max_tokens: int,
        capture: Capture,
        progress: Progress,
    ) -> None:
        self._model = model
        self._pool = pool
        self._sizes = sizes
        self._page_size = pool.layout.page_size
        self._padding_page = pool.pages - 1
        rows, vocabulary = sizes[-1], model.config.vocab_size
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self._logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=model.device)
        plans = attention.fixed_decodes(sizes, pages_for(max_tokens, self._page_size))
        self._captured: dict[int, _Captured] = {}
        # The largest first: the others then find its memory large enough.
        for size in reversed(sizes):
            plans[size].set(padded([], size, self._padding_page), self._page_size)
            self._captured[size] = _Captured(plans[size], capture(self._step(size, plans[size])))
            progress(len(self._captured), len(sizes))

    def _step(self, size: int, plan: FixedDecode) -> Callable[[], None]:
        def step() -> None:
            model = self._model
            hidden_BD = model.forward(
                model.embed(self._tokens[:size]), plan.positions, plan.plan, self._pool.tensor
            )
            self._logits[:size].copy_(model.logits(hidden_BD))

        return step

    def replay(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor | None:
        """Return the logits of a decode batch, (rows, vocabulary), valid until the next call.

        None if the batch is not one of those captured. `tokens`: int64 (rows,).
        """
        size = size_for(segments, self._sizes)
        if size is None:
            return None
        captured = self._captured[size]
        captured.plan.set(padded(segments, size, self._padding_page), self._page_size)
        self._tokens[: len(segments)].copy_(tokens)
        captured.replay()
        return self._logits[: len(segments)]


def cuda_capture(device: torch.device) -> Capture:
    """Return what captures functions as CUDA graphs that share memory. Call it in one thread."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(function: Callable[[], None]) -> Replay:
        # First runs load kernels and take workspaces, which must not be part of a graph.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads, the data path's above all, do meanwhile is no error.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return capture
