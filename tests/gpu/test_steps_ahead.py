"""The next step lies ready while the device computes one: the text is that of step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from penstock_wire.messages import Sampling
from tests.gpu.models import CUDA, Loaded, save
from tests.unit.runtime.engine.decode_engines import generate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # kernels are compiled at first use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_text_is_the_same_as_step_by_step(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path, heads=4, kv_heads=2, head_dim=64)
    model = Loaded(path, dtype, CUDA).model
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 280, (6, 40), generator=generator).tolist()
    # All end by their length, so both ways compute the same batches.
    requests = [
        (
            prompt[: 40 - 3 * i],
            Sampling(
                seed=i,
                temperature=i % 2,
                max_tokens=20 + i,
                repetition_penalty=1.3 if i == 5 else 1,
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    one = await generate(model, requests)
    assert [len(tokens) for tokens in one] == [20 + i for i in range(6)]
    assert await generate(model, requests, steps_out=2) == one
