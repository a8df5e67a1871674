"""The same logits and seeds give the same tokens on the GPU and the CPU."""

from __future__ import annotations

from array import array

import pytest
import torch

from penstock_runtime.engine.sampler import SamplingRow, sample
from penstock_wire.messages import Sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [300, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_the_same_on_both(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(40, vocabulary, generator=generator) * 4).to(dtype)
    rows = [
        SamplingRow(
            Sampling(
                seed=i,
                temperature=[0.0, 0.6, 1.0, 1.5][i % 4],
                top_k=[0, 20, 1, 200][i // 4 % 4],
                top_p=[1.0, 0.95, 0.5][i % 3],
                min_p=[0.0, 0.0, 0.02][i // 3 % 3],
                frequency_penalty=0.4 if i % 10 == 9 else 0.0,
            ),
            array("i", range(i)),
            i // 2,
            i - i // 2,
        )
        for i in range(40)
    ]
    on_cpu = [token.id for token in sample(logits, rows)]
    on_gpu = [token.id for token in sample(logits.cuda(), rows)]
    assert on_gpu == on_cpu
