"""What runs on the compute thread: a stage's chunks, or a decode worker's batch with sampling.

With tensor parallelism rank 0 tells the others each step, and then all compute it together.
"""

from __future__ import annotations

from array import array
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from penstock_runtime.attention.base import Segment
from penstock_runtime.engine.rank_step import NoFollowers, RankStep
from penstock_runtime.engine.sampler import SamplingRow, sample
from penstock_runtime.errors import RankLost
from penstock_runtime.model.layers import WantedRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from penstock_runtime.engine.cuda_graphs import DecodeGraphs
    from penstock_runtime.engine.rank_step import Followers
    from penstock_runtime.kvcache.tensors import PoolTensor
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.transformer import Transformer
    from penstock_runtime.scheduler.batch import Batch
    from penstock_wire.messages import TokenOut


class StageRunner:
    """One stage's layers over a step's chunks."""

    def __init__(
        self,
        model: Transformer,
        pool: PoolTensor,
        *,
        embeds: bool,
        last: bool,
        followers: Followers | None = None,
    ) -> None:
        """`embeds`: the first stage. `last`: the last one, whose hidden states nobody asks for."""
        self._model = model
        self._pool = pool
        self._embeds = embeds
        self._wanted: tuple[int, ...] | None = () if last else None
        self._followers = followers or NoFollowers()
        self.page_size = pool.layout.page_size

    def run(self, hidden_or_tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Return the hidden states (T, D) behind this stage's layers; of the last one none.

        Args:
            hidden_or_tokens: token ids (T,) if this stage embeds, else hidden states (T, D).
            segments: the chunks, in the order of the rows.

        Raises RankLost if several ranks compute and one cannot.
        """
        inputs = hidden_or_tokens.to(self._model.device)
        tokens = hidden_or_tokens.to(torch.int32).numpy().tobytes() if self._embeds else b""
        self._followers.tell(RankStep.of(segments, tokens, self._wanted))
        with _in_step(self._model.ranks):
            if self._embeds:
                hidden_TD = self._model.embed(inputs)
            else:
                hidden_TD = self._model.ranks.share(inputs)
            hidden_TD = forward(self._model, self._pool, hidden_TD, segments, self._wanted)
        return hidden_TD.to(self._model.dtype)


class DecodeRunner:
    """A decode worker's batches: forward, head, sampler. With `graphs`, decode batches by these.

    A batch may have been made before the one in front of it was computed: the tokens that it lacks
    (`BatchSegment.ahead`) are those chosen by the last call.
    """

    def __init__(
        self,
        model: Transformer,
        pool: PoolTensor,
        *,
        graphs: DecodeGraphs | None = None,
        followers: Followers | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._graphs = graphs
        self._followers = followers or NoFollowers()
        self._chosen: dict[str, int] = {}
        """By request, in the last batch."""

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[TokenOut]:
        """Compute a batch; return the chosen token of each of `batch.sampled`, in order.

        Raises:
            BrokenLogits: the model gives no number to choose by.
            RankLost: several ranks compute and one cannot.
        """
        # What failed chooses nothing, so that a batch made behind it fails, too.
        chosen, self._chosen = self._chosen, {}
        segments = [Segment(start=s.start, length=s.length, pages=s.pages) for s in batch.segments]
        tokens = b"".join(
            array("i", [chosen[s.request_id]]) if s.ahead else memoryview(s.tokens).cast("B")
            for s in batch.segments
        )
        last, row = [], -1
        for segment in batch.segments:
            row += segment.length
            if segment.sample:
                last.append(row)
        self._followers.tell(RankStep.of(segments, tokens, last))
        with _in_step(self._model.ranks):
            logits = self._logits(_ids(tokens), segments, last)
        if not last:
            return []
        rows = [
            replace(row, latest=chosen[segment.request_id]) if segment.ahead else row
            for segment, row in zip(batch.sampled, rows, strict=True)
        ]
        sampled = sample(logits, rows)
        for segment, token in zip(batch.sampled, sampled, strict=True):
            self._chosen[segment.request_id] = token.id
        return sampled

    def _logits(
        self, tokens: torch.Tensor, segments: Sequence[Segment], last: list[int]
    ) -> torch.Tensor:
        """Compute the batch; return the logits of the rows `last`, of which there may be none."""
        model = self._model
        if self._graphs is not None:
            logits_BV = self._graphs.replay(tokens, segments)
            if logits_BV is not None:
                return logits_BV if len(last) == len(segments) else logits_BV[last]
        embedded_TD = model.embed(tokens.to(model.device))
        hidden_RD = forward(model, self._pool, embedded_TD, segments, last)
        return model.logits(hidden_RD) if last else hidden_RD


class FollowingRunner:
    """The part of a rank that is told its steps."""

    def __init__(self, model: Transformer, pool: PoolTensor) -> None:
        self._model = model
        self._pool = pool

    def follow(self, step: RankStep) -> None:
        """Compute this rank's part of a step; what comes of it is with rank 0."""
        model, segments = self._model, step.batch()
        if step.tokens:
            hidden_TD = model.embed(_ids(step.tokens).to(model.device))
        else:
            shape = (sum(segment.length for segment in segments), model.config.hidden_size)
            hidden_TD = model.ranks.share(
                torch.empty(shape, dtype=model.dtype, device=model.device)
            )
        hidden_RD = forward(model, self._pool, hidden_TD, segments, step.wanted)
        if step.wanted:
            model.logits(hidden_RD)


def forward(
    model: Transformer,
    pool: PoolTensor,
    hidden_TD: torch.Tensor,
    segments: Sequence[Segment],
    rows: Sequence[int] | None,
) -> torch.Tensor:
    """Return hidden states behind the model's layers, (R, D); KV of all rows goes into the pool.

    See `Transformer.forward`.

    Args:
        model: its layers.
        pool: where the pages of the segments are.
        hidden_TD: in front of the layers.
        segments: the batch.
        rows: those whose hidden states are wanted, rising; None: all.
    """
    page_size, device = pool.layout.page_size, model.device
    plan = model.attention.plan(segments, page_size, device)
    wanted = None
    if rows is not None and len(rows) < len(hidden_TD):
        wanted = WantedRows.of(segments, rows, model.attention, page_size, device)
    positions = None if model.positions_in_plan else positions_of(segments, device)
    return model.forward(hidden_TD, positions, plan, pool.tensor, wanted)


def positions_of(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """Return the positions of the segments' tokens, in batch order, int64 (T,)."""
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in segments]).to(device)


@contextmanager
def _in_step(ranks: Collective) -> Iterator[None]:
    """Raise RankLost for whatever fails while several ranks compute a step.

    Either another rank is gone, which gloo may report before its end is noticed, or this one leaves
    the others in the middle of the step: then their next sum would not be that of the next step.
    """
    try:
        yield
    except Exception as error:
        if ranks.size == 1:
            raise
        raise RankLost(
            f"a step that {ranks.size} ranks compute together failed: {error}"
        ) from error


def _ids(tokens: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(tokens), dtype=torch.int32).to(torch.int64)
