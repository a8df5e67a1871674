"""The CUDA path gives what the CPU path and transformers give.

Run with `pytest -m gpu` on a machine with a GPU. In float32 the tolerance is that of rounding. In
bfloat16 no two implementations agree to more than a few units of its eight bits; the bound is the
distance of transformers' own bfloat16 from float32, doubled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock_runtime.attention.dense import DenseAttention
from penstock_runtime.attention.flashinfer import FlashInferAttention
from tests.gpu.models import CPU, CUDA, Loaded, save

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # kernels are compiled at first use

TOKENS = torch.arange(3, 123) % 280
OTHER = torch.arange(150, 250) % 280
CHUNKS = [(0, 32), (32, 80), (80, 99), (99, 100), (100, 101), (101, 120)]


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """In float32 compare float32, not the tensor cores' rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module", params=[(4, 2, 64), (8, 1, 128)], ids=["group 2", "group 8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads, kv_heads, head_dim = request.param
    folder = tmp_path_factory.mktemp("model")
    return save(folder, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


@torch.inference_mode()
def logits_of(path: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(CUDA)
    logits: torch.Tensor = model(tokens[None].to(CUDA)).logits[0]
    return logits.float().cpu()


def in_chunks(loaded: Loaded, tokens: torch.Tensor, pages: list[int]) -> torch.Tensor:
    return torch.cat([loaded.step([(tokens[start:end], start, pages)]) for start, end in CHUNKS])


def test_float32_equals_transformers_and_the_cpu(path: Path) -> None:
    pages = [5, 2, 7, 0, 3, 1, 4, 9]
    on_gpu, on_cpu = Loaded(path, torch.float32, CUDA), Loaded(path, torch.float32, CPU)
    assert isinstance(on_gpu.model.attention, DenseAttention)
    actual = in_chunks(on_gpu, TOKENS, pages)
    assert (actual - logits_of(path, TOKENS, torch.float32)).abs().max() < 1e-4
    assert (actual - in_chunks(on_cpu, TOKENS, pages)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_and_decode_steps_equal_transformers_and_the_cpu(
    path: Path, dtype: torch.dtype
) -> None:
    pages = [5, 2, 7, 0, 3, 1, 4, 9]
    on_gpu, on_cpu = Loaded(path, dtype, CUDA), Loaded(path, dtype, CPU)
    assert isinstance(on_gpu.model.attention, FlashInferAttention)
    exact = logits_of(path, TOKENS, torch.float32)
    bound = 2 * (logits_of(path, TOKENS, dtype) - exact).abs().max()
    actual = in_chunks(on_gpu, TOKENS, pages)
    assert (actual - exact).abs().max() < bound
    assert (actual - in_chunks(on_cpu, TOKENS, pages)).abs().max() < bound
    kv_gpu, kv_cpu = on_gpu.pool.tensor[pages].cpu().float(), on_cpu.pool.tensor[pages].float()
    assert (kv_gpu - kv_cpu).abs().max() < 0.05 * kv_cpu.abs().max()


def test_mixed_batches_equal_separate_ones(path: Path) -> None:
    first, second = [5, 2, 7, 0, 3, 1, 4], [11, 10, 30, 8, 20, 21, 22]
    together, apart = (Loaded(path, torch.bfloat16, CUDA) for _ in range(2))
    for loaded in (together, apart):
        loaded.step([(TOKENS[:40], 0, first)])
    mixed = together.step([(TOKENS[40:41], 40, first), (OTHER[:50], 0, second)])
    separate = torch.cat(
        [
            apart.step([(TOKENS[40:41], 40, first)]),
            apart.step([(OTHER[:50], 0, second)]),
        ]
    )
    exact = torch.cat(
        [
            logits_of(path, TOKENS[:41], torch.float32)[40:],
            logits_of(path, OTHER[:50], torch.float32),
        ]
    )
    bound = 2 * (separate - exact).abs().max()
    assert (mixed - separate).abs().max() < bound
