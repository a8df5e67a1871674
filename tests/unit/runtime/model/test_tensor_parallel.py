"""Ranks together compute what one computes alone; each reads only its part of the weights."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.attention.base import Segment
from penstock_runtime.attention.paged_native import PagedNativeAttention
from penstock_runtime.engine.runner import forward
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.collective import Ranks
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.errors import ModelConfigError
from penstock_runtime.model.fields import Fields
from penstock_runtime.model.shard import Shard
from penstock_runtime.model.transformer import Transformer
from tests.unit.runtime.kernels.built import built_kernels

from .checkpoints import CONFIGS, Reference, reference

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
PAGE = 8
ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: reference(CONFIGS[name], root / name))


class Rank:
    """One rank of a model, on a thread of its own."""

    def __init__(self, path: Path, meeting: Path, rank: int, size: int, dtype: torch.dtype):
        self.ranks = Ranks(
            rank=rank, size=size, meeting=meeting, device=CPU, address="127.0.0.1", timeout=30
        )
        config = ModelConfig.from_directory(path)
        layers = (0, config.layers)
        self.model = Transformer.load(
            path,
            config,
            layers=layers,
            embed=True,
            head=True,
            dtype=dtype,
            device=CPU,
            ranks=self.ranks,
        )
        layout = self.model.config.kv_layout(layers=layers, page_size=PAGE, dtype=dtype)
        self.pool = PoolTensor(layout, 16, dtype=dtype, device=CPU)
        self.ranks.connect()

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
        """Return the logits of a prompt, computed in chunks that end at `cuts`."""
        found, start = [], 0
        for end in cuts:
            segment = Segment(start=start, length=end - start, pages=range(16))
            plan = self.model.attention.plan([segment], PAGE, CPU)
            hidden = self.model.embed(tokens[start:end])
            # As between stages: what rank 0 has is what counts.
            hidden = self.ranks.share(hidden if not self.ranks.rank else torch.empty_like(hidden))
            positions = torch.arange(start, end)
            hidden = self.model.forward(hidden, positions, plan, self.pool.tensor)
            found.append(self.model.logits(hidden))
            start = end
        return torch.cat(found)


def together(
    path: Path, folder: Path, size: int, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return rank 0's logits of a prompt that `size` ranks compute."""

    def one(rank: int) -> torch.Tensor:
        return Rank(path, folder / "meeting", rank, size, dtype).logits(
            tokens, [19, 20, len(tokens)]
        )

    with ThreadPoolExecutor(size) as threads:
        first, *_ = threads.map(one, range(size))
        return first


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3", "qwen3-yarn"])
def test_ranks_together_equal_transformers(name, size, references, tmp_path) -> None:
    known: Reference = references(name)
    config = ModelConfig.from_directory(known.path)
    if config.heads % size:
        pytest.fail(f"{name} has {config.heads} heads: choose another model")
    logits = together(known.path, tmp_path, size, known.tokens[0])
    torch.testing.assert_close(logits, known.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, references, tmp_path) -> None:
    known: Reference = references("qwen3")
    logits = together(known.path, tmp_path, 2, known.tokens[0], dtype)
    error = (logits - known.logits[0]).std() / known.logits[0].std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_no_rank_is_done_before_all_have_written(references, tmp_path, monkeypatch) -> None:
    """Rank 0 sends everybody's pages away when its own forward has ended.

    Behind a last layer of which no row is wanted there is no sum that would hold it back.
    """
    built_kernels()
    known: Reference = references("qwen3")
    events: list[str] = []
    rank_0_wrote = threading.Event()

    def one(rank: int) -> None:
        it = Rank(known.path, tmp_path / "meeting", rank, 2, torch.float32)
        attention = it.model.attention
        assert isinstance(attention, PagedNativeAttention)
        write, last = attention.write_projected, it.pool.layer(it.model.num_layers - 1)

        def slow(plan, qkv, heads, norm, rotations, kv_layer):
            if rank and kv_layer.data_ptr() == last.data_ptr():
                rank_0_wrote.wait(timeout=30)
                time.sleep(0.1)  # what rank 0 would need to end, and more
                events.append("rank 1 writes")
            out = write(plan, qkv, heads, norm, rotations, kv_layer)
            if not rank and kv_layer.data_ptr() == last.data_ptr():
                rank_0_wrote.set()
            return out

        monkeypatch.setattr(attention, "write_projected", slow)
        segments = [Segment(start=0, length=20, pages=range(16))]
        with torch.inference_mode():
            hidden = it.model.embed(known.tokens[0, :20])
            forward(it.model, it.pool, hidden, segments, ())
        if not rank:
            events.append("rank 0 has ended")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(one, range(2)))
    assert events == ["rank 1 writes", "rank 0 has ended"]


@given(size=st.sampled_from([1, 2, 3, 4, 8]), kv_heads=st.sampled_from([1, 2, 4, 8]))
def test_every_row_and_column_is_held(size: int, kv_heads: int) -> None:
    """Once for what is divided; KV heads at least once, by the ranks whose queries want them."""
    config = replace(_config(), heads=24, kv_heads=kv_heads, intermediate_size=101, vocab_size=1001)
    if kv_heads % size and size % kv_heads:
        with pytest.raises(ModelConfigError, match="KV heads"):
            Shard(0, size).local(config)
        return
    shards = [Shard(rank, size) for rank in range(size)]
    for name, count in (
        ("self_attn.q_proj.weight", 24 * config.head_dim),
        ("self_attn.o_proj.weight", 24 * config.head_dim),
        ("mlp.gate_proj.weight", 101),
        ("mlp.down_proj.weight", 101),
    ):
        cuts = [shard.layer_cuts(config)[name] for shard in shards]
        assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(count))
    rows = [shard.vocabulary(config) for shard in shards]
    assert [row for cut in rows for row in range(cut.start, cut.stop)] == list(range(1001))
    group = 24 // kv_heads
    for shard in shards:
        first, last = shard.kv_heads(config)
        queries = shard.share(24)
        assert {query // group for query in range(*queries)} == set(range(first, last))
        local = shard.local(config)
        assert local.kv_heads == last - first
        assert local.heads == queries[1] - queries[0]


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(ModelConfigError, match=r"tensorParallel 5 does not divide .* 24 attention"):
        Shard(0, 5).local(replace(_config(), heads=24))


@cache
def _config() -> ModelConfig:
    return ModelConfig.from_fields(Fields(CONFIGS["llama"].to_dict() | ARCHITECTURE, "config.json"))
