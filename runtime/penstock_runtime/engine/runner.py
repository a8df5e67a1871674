"""What runs on the compute thread: a stage's chunks, or a decode worker's batch with sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.sampler import SamplingRow, sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.engine.cuda_graphs import DecodeGraphs
    from penstock_runtime.kvcache.tensors import PoolTensor
    from penstock_runtime.model.transformer import Transformer
    from penstock_runtime.scheduler.batch import Batch
    from penstock_wire.messages import TokenOut


class StageRunner:
    """One stage's layers over a step's chunks."""

    def __init__(self, model: Transformer, pool: PoolTensor, *, embeds: bool) -> None:
        self._model = model
        self._pool = pool
        self._embeds = embeds
        self.page_size = pool.layout.page_size

    def run(self, hidden_or_tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Return the hidden states (T, D) behind this stage's layers.

        Args:
            hidden_or_tokens: token ids (T,) if this stage embeds, else hidden states (T, D).
            segments: the chunks, in the order of the rows.
        """
        model = self._model
        inputs = hidden_or_tokens.to(model.device)
        hidden_TD = model.embed(inputs) if self._embeds else inputs
        plan = model.attention.plan(segments, self.page_size, model.device)
        return model.forward(
            hidden_TD, positions_of(segments, model.device), plan, self._pool.tensor
        )


class DecodeRunner:
    """A decode worker's batches: forward, head, sampler. With `graphs`, decode batches by these."""

    def __init__(
        self, model: Transformer, pool: PoolTensor, graphs: DecodeGraphs | None = None
    ) -> None:
        self._model = model
        self._pool = pool
        self._graphs = graphs
        self._page_size = pool.layout.page_size

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[TokenOut]:
        """Compute a batch; return the chosen token of each of `batch.sampled`, in order.

        Raises BrokenLogits if the model gives no number to choose by.
        """
        segments = [Segment(start=s.start, length=s.length, pages=s.pages) for s in batch.segments]
        tokens = torch.cat([torch.frombuffer(s.tokens, dtype=torch.int32) for s in batch.segments])
        last, row = [], -1
        for segment in batch.segments:
            row += segment.length
            if segment.sample:
                last.append(row)
        logits = self._logits(tokens.to(torch.int64), segments, last)
        return sample(logits, rows) if last else []

    def _logits(
        self, tokens: torch.Tensor, segments: Sequence[Segment], last: list[int]
    ) -> torch.Tensor:
        """Compute the batch; return the logits of the rows `last`, of which there may be none."""
        model = self._model
        if self._graphs is not None:
            logits_BV = self._graphs.replay(tokens, segments)
            if logits_BV is not None:
                return logits_BV if len(last) == len(segments) else logits_BV[last]
        plan = model.attention.plan(segments, self._page_size, model.device)
        hidden_TD = model.forward(
            model.embed(tokens.to(model.device)),
            positions_of(segments, model.device),
            plan,
            self._pool.tensor,
        )
        return model.logits(hidden_TD[last]) if last else hidden_TD[:0]


def positions_of(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """Return the positions of the segments' tokens, in batch order, int64 (T,)."""
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in segments]).to(device)
