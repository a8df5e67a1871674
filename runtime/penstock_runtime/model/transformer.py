"""A stage's part of a model: the layers [a, b), and perhaps the embedding and the head.

A border may lie within a layer, see `kvcache.base`.

Shape letters: T tokens of the batch, D hidden size, R rows chosen for sampling, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from penstock_runtime.attention.base import AttentionShape
from penstock_runtime.attention.paged_native import PagedNativeAttention
from penstock_runtime.attention.registry import create_attention
from penstock_runtime.kernels.layers import LastLayer
from penstock_runtime.kernels.selection import select_kernels
from penstock_runtime.kvcache.base import attention_layers
from penstock_runtime.model.collective import Alone
from penstock_runtime.model.fused import fused_kernels
from penstock_runtime.model.layers import AttentionStep, Fused
from penstock_runtime.model.linear import compute_dtype
from penstock_runtime.model.loader import Loader, Part
from penstock_runtime.model.native_layers import native_layers
from penstock_runtime.model.operators import create_operators
from penstock_runtime.model.rope import RopeTable, frequencies, rotations
from penstock_runtime.model.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from penstock_runtime.attention.base import AttentionBackend
    from penstock_runtime.kernels.layers import NativeLayers
    from penstock_runtime.kernels.selection import KernelChoice
    from penstock_runtime.kvcache.base import LayerRange
    from penstock_runtime.model.collective import Collective
    from penstock_runtime.model.config import ModelConfig
    from penstock_runtime.model.fused import FusedKernels
    from penstock_runtime.model.layers import DecoderLayer, Embedding, Head, WantedRows
    from penstock_runtime.model.weights import Progress

log = logging.getLogger(__name__)


class Transformer:
    """The layers [a, b) of a model on one device.

    Hidden states have the precision of `dtype` behind every attention and feed-forward; inside,
    arithmetic is in `compute_dtype`. So where a model is cut into stages changes no bit of its
    result. Call under `torch.inference_mode`, from one thread at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        attention: AttentionBackend[Any],
        layers: Sequence[DecoderLayer],
        embedding: Embedding | None,
        head: Head | None,
        ranks: Collective,
        kernels: FusedKernels | None,
        native_layers: NativeLayers | None,
        matrix_bytes: int | None,
    ) -> None:
        self.config = config
        """Of this rank: its heads, its part of the feed-forward."""
        self.ranks = ranks
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.device = device
        self.attention = attention
        """The backend whose `plan` makes what `forward` takes."""
        self.kernels = kernels
        """The device's own kernels; None: torch's operations."""
        self.matrix_bytes = matrix_bytes
        """What the matrices take in memory with the C++ kernels; None: without these."""
        self._layers = layers
        self._native_layers = native_layers
        self._embedding = embedding
        self._head = head
        self._frequencies = frequencies(config.rope, config.head_dim).to(device)

    @classmethod
    def load(
        cls,
        path: Path,
        config: ModelConfig,
        *,
        layers: LayerRange,
        embed: bool,
        head: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelChoice = "auto",
        attention: AttentionBackend[Any] | None = None,
        ranks: Collective | None = None,
        progress: Progress | None = None,
    ) -> Transformer:
        """Read the tensors of the layers [a, b), and those of embedding and head if asked for.

        Args:
            path: directory in Hugging Face format.
            config: of the same directory.
            layers: the range; at least one layer's attention lies in it.
            embed: the first stage, and a decode worker: `embed` will be called.
            head: a decode worker: `logits` will be called.
            dtype: of KV and of activations between stages; weights are rounded to it.
            device: where to compute.
            kernels: whose; see `kernels.selection`.
            attention: None: the device's and the kernels' own.
            ranks: those that share every layer, this one among them; None: there is one.
            progress: called with (bytes read, bytes in all) after every tensor.

        Raises:
            WeightsError: a tensor is missing, has another shape, or cannot be read.
            ModelConfigError: the heads cannot be dealt out to so many ranks.
            ConfigurationError: the device or the kernels asked for lack something.
            ValueError: the range of layers is not one of this model's.
        """
        first, last = layers
        held = attention_layers(layers)
        if not (0 <= first < last <= config.layers and held[0] < held[1]):
            raise ValueError(f"layers [{first}, {last}) of a model with {config.layers}")
        if first * 2 % 1 or last * 2 % 1:
            raise ValueError(f"layers [{first}, {last}): a border is at a layer or at its half")
        ranks = ranks or Alone()
        part = Part(config=config, layers=layers, embed=embed, head=head, collective=ranks)
        local = part.shard.local(config)
        native = select_kernels(kernels, device)
        fused = fused_kernels(compute_dtype(dtype, device), device)
        operators = create_operators(native, fused, dtype, device)
        if attention is None:
            attention = create_attention(device, attention_shape(local, dtype, device), native)
        with torch.inference_mode():
            loader = Loader(
                Checkpoint(path),
                part,
                dtype=dtype,
                device=device,
                operators=operators,
                progress=progress or _silent,
            )
            decoder_layers = loader.layers()
            whole = None
            if (
                native is not None
                and ranks.size == 1
                and isinstance(attention, PagedNativeAttention)
            ):
                whole = native_layers(native, decoder_layers, attention, local, dtype)
            embedding = loader.embedding() if embed else None
            output = loader.head() if head else None
            if native is not None:
                log.info(
                    "matrices: %.0f MiB in memory, %.1f bits an element",
                    native.weight_bytes / 2**20,
                    8 * native.weight_bytes / native.weight_elements,
                )
            return cls(
                local,
                dtype=dtype,
                compute_dtype=operators.compute_dtype,
                device=device,
                attention=attention,
                layers=decoder_layers,
                embedding=embedding,
                head=output,
                ranks=ranks,
                kernels=fused,
                native_layers=whole,
                matrix_bytes=None if native is None else native.weight_bytes,
            )

    @property
    def positions_in_plan(self) -> bool:
        """Whether `forward` takes the positions from the plan: the C++ kernels have all layers."""
        return self._native_layers is not None

    @property
    def num_layers(self) -> int:
        """Layers whose attention, and so whose KV, is held."""
        return sum(layer.attention is not None for layer in self._layers)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, (T, D). Only with `embed`."""
        assert self._embedding is not None, "loaded without the embedding"
        return self._embedding(token_ids_T)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_T: torch.Tensor | None,
        plan: Any,
        kv_pool: torch.Tensor,
        wanted: WantedRows | None = None,
    ) -> torch.Tensor:
        """Run the layers [a, b) and return the hidden states (T, D), or those wanted, (R, D).

        They are of `compute_dtype`, with values that `dtype` has.

        Args:
            hidden_TD: of the layer before; not changed.
            positions_T: of the batch's tokens, in batch order; None with `positions_in_plan`.
            plan: `self.attention.plan` of the same batch.
            kv_pool: (pages, layers, 2, K, S, H); keys and values of the batch are written.
            wanted: the rows whose hidden states are wanted; None: all. Only with a model's end.
        """
        x_TD = hidden_TD.to(self.compute_dtype, copy=True)
        if self._native_layers is not None:
            return self._native_layers.run(
                x_TD,
                slots=plan.slots,
                segments=plan.segments,
                kv_pool=kv_pool,
                last=None if wanted is None else _last_layer(wanted),
            )
        assert positions_T is not None
        turns = rotations(positions_T, self._frequencies, self.config.rope.attention_factor)
        fused = None if self.kernels is None else Fused(self.kernels, RopeTable.of(turns))
        step = AttentionStep(self.attention, plan, turns, fused)
        kv_layers = iter(kv_pool.unbind(1))
        for layer in self._layers:
            if layer.attention is not None:
                kv_layer = next(kv_layers)
                if wanted is not None and layer is self._layers[-1]:
                    x_TD = layer.attention.last(x_TD, step, kv_layer, wanted)
                else:
                    layer.attention(x_TD, step, kv_layer)
            if layer.feed_forward is not None and len(x_TD):
                layer.feed_forward(x_TD)
        return x_TD

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (R, V) of chosen rows of the last layer. Only with `head`.

        On ranks other than 0: their own columns of them.
        """
        assert self._head is not None, "loaded without the head"
        return self._head(hidden_RD.to(self.compute_dtype)).float()


def attention_shape(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> AttentionShape:
    """Return what the attention of a model kept in `dtype` looks like on `device`."""
    return AttentionShape(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=compute_dtype(dtype, device),
    )


def _last_layer(wanted: WantedRows) -> LastLayer:
    return LastLayer(wanted.rows, None if wanted.plan is None else wanted.plan.segments)


def _silent(_done: int, _total: int) -> None:
    pass
