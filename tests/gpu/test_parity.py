"""The CUDA path gives what transformers gives. Run with `pytest -m gpu` on a machine with a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock_runtime.attention.base import Segment
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.transformer import Transformer
from tests.integration.system import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

PAGE = 16


@torch.inference_mode()
def test_chunks_on_cuda_equal_transformers(tmp_path: Path) -> None:
    path = checkpoint.make(tmp_path)
    config = ModelConfig.from_directory(path)
    device, dtype = torch.device("cuda", 0), torch.float32
    model = Transformer.load(
        path, config, layers=(0, config.layers), embed=True, head=True, dtype=dtype, device=device
    )
    layout = config.kv_layout(layers=(0, config.layers), page_size=PAGE, dtype=dtype)
    pool = PoolTensor(layout, 8, dtype=dtype, device=device)
    tokens = torch.arange(3, 103) % checkpoint.EOS
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(tokens[None]).logits[0]
    pages, logits = [5, 2, 7, 0, 3, 1, 4], []
    for start, end in ((0, 32), (32, 80), (80, 99), (99, 100)):
        segments = [Segment(start=start, length=end - start, pages=pages)]
        hidden = model.forward(
            model.embed(tokens[start:end].to(device)),
            torch.arange(start, end, device=device),
            model.attention.plan(segments, PAGE, device),
            pool.tensor,
        )
        logits.append(model.logits(hidden).cpu())
    assert (torch.cat(logits) - expected).abs().max() < 1e-4
