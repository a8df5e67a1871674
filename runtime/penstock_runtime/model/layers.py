"""The layers of a decoder-only transformer, built from a checkpoint's tensors.

Shape letters: T tokens of the batch, D hidden size, N query heads, K KV heads, H head dim,
F feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from penstock_runtime.attention.base import ProjectedAttention, single_rows
from penstock_runtime.model.rope import interleave_rows, rotate_

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_runtime.attention.base import AttentionBackend, Segment
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.fused import FusedKernels
    from penstock_runtime.model.linear import Linear
    from penstock_runtime.model.operators import Operators
    from penstock_runtime.model.rope import RopeTable

Tensors = dict[str, torch.Tensor]
"""A layer's tensors by their names in the checkpoint, without the layer's prefix."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one forward pass tells the attention of all its layers."""

    backend: AttentionBackend[Any]
    plan: Any
    """The backend's own."""
    rotations: torch.Tensor
    """See `rope.rotations`; complex64 (T, 1, H/2)."""
    fused: Fused | None = None
    """Kernels of the device for what lies before attention; None: torch's own operations."""


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows of a batch, R of them in rising order, whose hidden states are wanted in the end.

    Of the last layer nothing else is computed but keys and values.
    """

    rows: torch.Tensor
    """int64, on the model's device."""
    plan: Any
    """The attention's, by `plan_rows`; None if R is 0."""

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        rows: Sequence[int],
        attention: AttentionBackend[Any],
        page_size: int,
        device: torch.device,
    ) -> WantedRows:
        """Return rows of a batch, after its own plan was made."""
        singles = single_rows(segments, rows)
        plan = attention.plan_rows(singles, page_size, device) if singles else None
        return cls(torch.tensor(rows, dtype=torch.int64, device=device), plan)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Fused:
    """Kernels of the device, and the rotations as they take them."""

    kernels: FusedKernels
    table: RopeTable


class HeadNorm:
    """RMS norm over each head of q and k, with their own weights, in float32."""

    def __init__(self, q_weight_H: torch.Tensor, k_weight_H: torch.Tensor, config: ModelConfig):
        q_NH = q_weight_H.float().expand(config.heads, -1)
        k_KH = k_weight_H.float().expand(config.kv_heads, -1)
        self.weight_NH = torch.cat([q_NH, k_KH])
        self._q_weight_H, self._k_weight_H = q_weight_H, k_weight_H
        self.eps = config.norm_eps

    def __call__(self, qk_TNH: torch.Tensor) -> torch.Tensor:
        """Return a new tensor; qk has the query heads, then the key heads, float32."""
        return functional.rms_norm(qk_TNH, qk_TNH.shape[-1:], None, self.eps).mul_(self.weight_NH)

    def apart(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, kernels: FusedKernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new tensors for q and k, in their own dtype."""
        return (
            kernels.norm(q_TNH, self._q_weight_H, self.eps),
            kernels.norm(k_TKH, self._k_weight_H, self.eps),
        )


class Attention:
    """Grouped-query attention with rotary positions (Ainslie et al., arXiv 2305.13245)."""

    def __init__(self, tensors: Tensors, config: ModelConfig, operators: Operators) -> None:
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._head_dim = config.head_dim
        self.qkv = operators.linear(
            _rows(tensors, config, "weight"),
            _rows(tensors, config, "bias") if config.qkv_bias else None,
        )
        self.output = operators.linear(
            tensors["self_attn.o_proj.weight"], tensors.get("self_attn.o_proj.bias")
        )
        self.norm: HeadNorm | None = None
        if config.qk_norm:
            self.norm = HeadNorm(
                interleave_rows(tensors["self_attn.q_norm.weight"], config.head_dim),
                interleave_rows(tensors["self_attn.k_norm.weight"], config.head_dim),
                config,
            )

    def write(
        self, x_TD: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor
    ) -> torch.Tensor:
        """Write the keys and values of x into the layer's pages.

        Returns the queries as `attend` takes them: one row a token, in the shape that the
        backend gives them.
        """
        qkv_TW, backend = self.qkv(x_TD), step.backend
        if isinstance(backend, ProjectedAttention):
            norm = None if self.norm is None else (self.norm.weight_NH, self.norm.eps)
            return backend.write_projected(
                step.plan, qkv_TW, self._heads, norm, step.rotations, kv_layer
            )
        qkv = qkv_TW.view(len(x_TD), -1, self._head_dim)
        turned = self._heads + self._kv_heads
        qk, v_TKH = qkv[:, :turned], qkv[:, turned:]
        q_TNH, k_TKH = self._turn(qk, step) if step.fused is None else self._fused(qk, step.fused)
        backend.write(step.plan, k_TKH, v_TKH, kv_layer)
        return q_TNH

    def attend(
        self, backend: AttentionBackend[Any], plan: Any, q: torch.Tensor, kv_layer: torch.Tensor
    ) -> torch.Tensor:
        """Return what `output` takes, of rows that `write` returned; `plan` is of these rows."""
        scale = self._head_dim**-0.5
        if isinstance(backend, ProjectedAttention):
            return backend.attend_projected(plan, q, self._heads, kv_layer, scale)
        return backend.attend(plan, q, kv_layer, scale).reshape(len(q), -1)

    def _turn(self, qk_TNH: torch.Tensor, step: AttentionStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k with norm and rotation, in float32 on the way."""
        qk = qk_TNH.float()
        if self.norm is not None:
            qk = self.norm(qk)
        rotate_(qk, step.rotations)
        qk = qk.to(qk_TNH.dtype)
        return qk[:, : self._heads], qk[:, self._heads :]

    def _fused(self, qk_TNH: torch.Tensor, fused: Fused) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same by the device's kernels; without a norm, in the memory of qk."""
        q_TNH, k_TKH = qk_TNH[:, : self._heads], qk_TNH[:, self._heads :]
        if self.norm is not None:
            q_TNH, k_TKH = self.norm.apart(q_TNH, k_TKH, fused.kernels)
        fused.kernels.rotate_(q_TNH, k_TKH, fused.table)
        return q_TNH, k_TKH


class FeedForward:
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, tensors: Tensors, config: ModelConfig, operators: Operators) -> None:
        gate_up = [tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]]
        bias = None
        if config.mlp_bias:
            bias = torch.cat([tensors["mlp.gate_proj.bias"], tensors["mlp.up_proj.bias"]])
        self._operators = operators
        self.gate_up = operators.linear(torch.cat(gate_up), bias)
        self.down = operators.linear(
            tensors["mlp.down_proj.weight"], tensors.get("mlp.down_proj.bias")
        )

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return what `down` takes, (T, F)."""
        return self._operators.silu_multiply(self.gate_up(x_TD))


class Residual:
    """Adds a block's output, summed over the ranks, to the hidden states.

    They keep the precision of `dtype` behind every block, so that where a model is cut into stages
    changes no bit of its result.
    """

    def __init__(self, ranks: Collective, dtype: torch.dtype) -> None:
        self.ranks = ranks
        self._dtype = dtype

    def add(self, x_TD: torch.Tensor, output: Linear, inner: torch.Tensor) -> None:
        """Add the output layer's product, of all ranks, to x."""
        if self.ranks.size == 1:
            output.add_to(x_TD, inner)
        else:
            x_TD += self.ranks.sum(output(inner))
        if x_TD.dtype != self._dtype:
            x_TD.copy_(x_TD.to(self._dtype))


class AttentionBlock:
    """Attention with a norm before and a residual around it. A rank has some of the heads."""

    def __init__(
        self, tensors: Tensors, config: ModelConfig, operators: Operators, residual: Residual
    ) -> None:
        self.norm = operators.norm(tensors["input_layernorm.weight"], config.norm_eps)
        self.attention = Attention(tensors, config, operators)
        self._residual = residual

    def __call__(self, x_TD: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor) -> None:
        """Add the block's contribution to x, in place."""
        q = self.attention.write(self.norm(x_TD), step, kv_layer)
        self._contribute(x_TD, self.attention.attend(step.backend, step.plan, q, kv_layer))

    def last(
        self, x_TD: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor, wanted: WantedRows
    ) -> torch.Tensor:
        """Write all keys and values; return the hidden states of the wanted rows, (R, D)."""
        q, x_RD = self.attention.write(self.norm(x_TD), step, kv_layer), x_TD[wanted.rows]
        if len(wanted):
            attend = self.attention.attend
            self._contribute(x_RD, attend(step.backend, wanted.plan, q[wanted.rows], kv_layer))
        else:
            # With no sum behind it, rank 0 would take others' pages for written that are not yet.
            self._residual.ranks.meet()
        return x_RD

    def _contribute(self, x_TD: torch.Tensor, attended: torch.Tensor) -> None:
        self._residual.add(x_TD, self.attention.output, attended)


class FeedForwardBlock:
    """The feed-forward with a norm before and a residual around it. A rank has a part of it."""

    def __init__(
        self, tensors: Tensors, config: ModelConfig, operators: Operators, residual: Residual
    ) -> None:
        self.norm = operators.norm(tensors["post_attention_layernorm.weight"], config.norm_eps)
        self.mlp = FeedForward(tensors, config, operators)
        self._residual = residual

    def __call__(self, x_TD: torch.Tensor) -> None:
        """Add the block's contribution to x, in place."""
        self._residual.add(x_TD, self.mlp.down, self.mlp(self.norm(x_TD)))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then feed-forward; None is what another stage has, on this layer's other side."""

    attention: AttentionBlock | None
    feed_forward: FeedForwardBlock | None


class Embedding:
    """From token ids to hidden states. A rank has the rows [first, first + V) of the vocabulary."""

    def __init__(self, weight_VD: torch.Tensor, first: int, ranks: Collective) -> None:
        self._weight = weight_VD
        self._first = first
        self._ranks = ranks

    def __call__(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return (T, D)."""
        if self._ranks.size == 1:
            return functional.embedding(token_ids_T, self._weight)
        rows_T = token_ids_T - self._first
        others_T = (rows_T < 0) | (rows_T >= len(self._weight))
        found_TD = functional.embedding(rows_T.masked_fill(others_T, 0), self._weight)
        # All but one rank add zeros, so the sum is exact. Not every backend sums half precision.
        mine_TD = found_TD.masked_fill_(others_T[:, None], 0).float()
        return self._ranks.sum(mine_TD).to(self._weight.dtype)


class Head:
    """From the last layer's output to logits: the final norm, then the projection.

    A rank has `widths[rank]` columns of the logits.
    """

    def __init__(
        self,
        norm_D: torch.Tensor,
        weight_VD: torch.Tensor,
        config: ModelConfig,
        operators: Operators,
        ranks: Collective,
        widths: list[int],
    ) -> None:
        self._norm = operators.norm(norm_D, config.norm_eps)
        self._project = operators.linear(weight_VD, None)
        self._ranks = ranks
        self._widths = widths

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return (R, V); on ranks other than 0 their own columns of it."""
        return self._ranks.join_columns(self._project(self._norm(x_RD)), self._widths)


def _rows(tensors: Tensors, config: ModelConfig, kind: str) -> torch.Tensor:
    """Return the q, k and v projections as one, q and k reordered for the rotation."""
    q, k, v = (tensors[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
    head_dim = config.head_dim
    return torch.cat([interleave_rows(q, head_dim), interleave_rows(k, head_dim), v])
