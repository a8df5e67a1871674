"""The layers of a decoder-only transformer, built from a checkpoint's tensors.

Shape letters: T tokens of the batch, D hidden size, N query heads, K KV heads, H head dim,
F feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from penstock_runtime.attention.base import ProjectedAttention
from penstock_runtime.model.rope import interleave_rows, rotate_

if TYPE_CHECKING:
    from penstock_runtime.attention.base import AttentionBackend
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.operators import Operators

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


class HeadNorm:
    """RMS norm over each head of q and k, with their own weights, in float32."""

    def __init__(self, q_weight_H: torch.Tensor, k_weight_H: torch.Tensor, config: ModelConfig):
        q_NH = q_weight_H.float().expand(config.heads, -1)
        k_KH = k_weight_H.float().expand(config.kv_heads, -1)
        self.weight_NH = torch.cat([q_NH, k_KH])
        self.eps = config.norm_eps

    def __call__(self, qk_TNH: torch.Tensor) -> torch.Tensor:
        """Return a new tensor; qk has the query heads, then the key heads, float32."""
        return functional.rms_norm(qk_TNH, qk_TNH.shape[-1:], None, self.eps).mul_(self.weight_NH)


class Attention:
    """Grouped-query attention with rotary positions (Ainslie et al., arXiv 2305.13245)."""

    def __init__(self, tensors: Tensors, config: ModelConfig, operators: Operators) -> None:
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._head_dim = config.head_dim
        self._qkv = operators.linear(
            _rows(tensors, config, "weight"),
            _rows(tensors, config, "bias") if config.qkv_bias else None,
        )
        self._output = operators.linear(
            tensors["self_attn.o_proj.weight"], tensors.get("self_attn.o_proj.bias")
        )
        self._norm: HeadNorm | None = None
        if config.qk_norm:
            self._norm = HeadNorm(
                interleave_rows(tensors["self_attn.q_norm.weight"], config.head_dim),
                interleave_rows(tensors["self_attn.k_norm.weight"], config.head_dim),
                config,
            )

    def add_to(
        self, y_TD: torch.Tensor, x_TD: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor
    ) -> None:
        """Write the keys and values of x into the layer's pages, and add the output to y."""
        qkv_TW = self._qkv(x_TD)
        if isinstance(step.backend, ProjectedAttention):
            norm = None if self._norm is None else (self._norm.weight_NH, self._norm.eps)
            scale = self._head_dim**-0.5
            out_TW = step.backend.run_projected(
                step.plan, qkv_TW, self._heads, norm, step.rotations, kv_layer, scale
            )
        else:
            out_TW = self._attend(qkv_TW, step, kv_layer)
        self._output.add_to(y_TD, out_TW)

    def _attend(
        self, qkv_TW: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor
    ) -> torch.Tensor:
        qkv = qkv_TW.view(len(qkv_TW), -1, self._head_dim)
        turned = self._heads + self._kv_heads
        qk, v_TKH = qkv[:, :turned].float(), qkv[:, turned:]
        if self._norm is not None:
            qk = self._norm(qk)
        rotate_(qk, step.rotations)
        qk = qk.to(qkv.dtype)
        out_TNH = step.backend.run(
            step.plan,
            qk[:, : self._heads],
            qk[:, self._heads :],
            v_TKH,
            kv_layer,
            self._head_dim**-0.5,
        )
        return out_TNH.reshape(len(qkv), -1)


class FeedForward:
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, tensors: Tensors, config: ModelConfig, operators: Operators) -> None:
        gate_up = [tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]]
        bias = None
        if config.mlp_bias:
            bias = torch.cat([tensors["mlp.gate_proj.bias"], tensors["mlp.up_proj.bias"]])
        self._operators = operators
        self._gate_up = operators.linear(torch.cat(gate_up), bias)
        self._down = operators.linear(
            tensors["mlp.down_proj.weight"], tensors.get("mlp.down_proj.bias")
        )

    def add_to(self, y_TD: torch.Tensor, x_TD: torch.Tensor) -> None:
        """Add the output for x to y."""
        self._down.add_to(y_TD, self._operators.silu_multiply(self._gate_up(x_TD)))


class DecoderLayer:
    """Attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, tensors: Tensors, config: ModelConfig, operators: Operators) -> None:
        self._attention_norm = operators.norm(tensors["input_layernorm.weight"], config.norm_eps)
        self._attention = Attention(tensors, config, operators)
        self._mlp_norm = operators.norm(tensors["post_attention_layernorm.weight"], config.norm_eps)
        self._mlp = FeedForward(tensors, config, operators)

    def __call__(self, x_TD: torch.Tensor, step: AttentionStep, kv_layer: torch.Tensor) -> None:
        """Add the layer's contribution to x, in place."""
        self._attention.add_to(x_TD, self._attention_norm(x_TD), step, kv_layer)
        self._mlp.add_to(x_TD, self._mlp_norm(x_TD))


class Head:
    """From the last layer's output to logits: the final norm, then the projection."""

    def __init__(
        self,
        norm_D: torch.Tensor,
        weight_VD: torch.Tensor,
        config: ModelConfig,
        operators: Operators,
    ) -> None:
        self._norm = operators.norm(norm_D, config.norm_eps)
        self._project = operators.linear(weight_VD, None)

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return (R, V)."""
        return self._project(self._norm(x_RD))


def _rows(tensors: Tensors, config: ModelConfig, kind: str) -> torch.Tensor:
    """Return the q, k and v projections as one, q and k reordered for the rotation."""
    q, k, v = (tensors[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
    head_dim = config.head_dim
    return torch.cat([interleave_rows(q, head_dim), interleave_rows(k, head_dim), v])
