"""vLLM's engine as `engine_worker.py` measures it: its own environment imports this."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from engine_worker import MAX_MODEL_LEN, Generated
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from engine_worker import Options


class Engine:
    """vLLM's offline engine with its own defaults, but for length, memory and cores."""

    def __init__(self, options: Options) -> None:
        self._llm = LLM(
            model=str(options.model),
            dtype=options.dtype,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=True,
            **_memory(),
        )

    def generate(self, prompt_tokens: list[list[int]], count: int) -> Generated:
        """See `engine_worker.Engine`."""
        sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
        inputs = [{"prompt_token_ids": tokens} for tokens in prompt_tokens]
        started = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Generated(seconds, [list(output.outputs[0].token_ids) for output in outputs])

    def parts(self) -> dict[str, float]:
        """See `engine_worker.Engine`: it counts none."""
        return {}

    def limits(self) -> dict[str, float]:
        """See `engine_worker.Engine`: ours measures them."""
        return {}


def _memory() -> dict[str, float]:
    """Return its share of a GPU, which others that it is compared with need too."""
    return {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}
