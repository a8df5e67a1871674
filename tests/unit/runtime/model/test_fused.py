"""The model with a device's own kernels, over FlashInfer's stand-in, equals transformers too."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime.attention.flashinfer import FlashInferAttention
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.model import transformer
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.fused import FlashInferKernels, fused_kernels
from penstock_runtime.model.rope import RopeTable, rotate_, rotations
from penstock_runtime.model.transformer import attention_shape
from tests.unit.runtime import fake_flashinfer

from .checkpoints import CONFIGS, Reference, reference
from .test_parity import Sequences, assert_equal, prefill, stages

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_runtime.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: reference(CONFIGS[name], root / name))


def cuda_like(path: Path, cuts: list[int]) -> list[Transformer]:
    """Load a model as it is put together on CUDA, with the stand-in for the kernels."""
    shape = attention_shape(ModelConfig.from_directory(path), torch.float32, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "fused_kernels", lambda *_: FlashInferKernels(fake_flashinfer))
        return stages(path, cuts, attention=FlashInferAttention(fake_flashinfer, shape, CPU))


@pytest.mark.parametrize("name", ["llama-llama3", "llama-biased", "qwen2-yarn", "qwen3"])
def test_prefill_and_decode_equal_transformers(name, references):
    known: Reference = references(name)
    sequences = Sequences(cuda_like(known.path, [2]), page_size=8, count=1)
    assert_equal(prefill(sequences, known.tokens[0], [19, 1, 1, 24]), known.logits[0])


def test_mixed_batches_equal_transformers(references):
    known: Reference = references("qwen3")
    sequences = Sequences(cuda_like(known.path, []), page_size=4, count=2)
    prefill(sequences, known.tokens[0, :20], [20])
    logits = sequences.step([(0, known.tokens[0, 20:21]), (1, known.tokens[1, :30])])
    assert_equal(logits, torch.cat([known.logits[0, 20:21], known.logits[1, :30]]))


@pytest.mark.parametrize("magnitude", [1.0, 1.2])
def test_a_rope_table_turns_as_the_rotations_do(magnitude):
    positions = torch.tensor([0, 5, 131_071])
    turns = rotations(positions, 10000.0 ** -torch.arange(0, 1, 0.25), magnitude)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    expected_q, expected_k = q.clone(), k.clone()
    rotate_(expected_q, turns)
    rotate_(expected_k, turns)
    FlashInferKernels(fake_flashinfer).rotate_(q, k, RopeTable.of(turns))
    torch.testing.assert_close(q, expected_q)
    torch.testing.assert_close(k, expected_k)


def test_only_cuda_in_16_bits_has_kernels_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert fused_kernels(torch.bfloat16, CPU) is None
    assert fused_kernels(torch.float32, torch.device("cuda", 0)) is None
    with pytest.raises(ConfigurationError, match=r"penstock's `gpu` extra"):
        fused_kernels(torch.bfloat16, torch.device("cuda", 0))
