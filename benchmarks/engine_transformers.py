"""Hugging Face transformers as `engine_worker.measure` measures an engine. On CUDA."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from engine_worker import Generated
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from engine_worker import Options


class Engine:
    """`generate` with torch's own attention, in the dtype of the others. It caches no prefixes."""

    def __init__(self, options: Options) -> None:
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        self._model = model.to("cuda").eval()

    @torch.inference_mode()
    def generate(self, prompt_tokens: list[list[int]], count: int) -> Generated:
        """See `engine_worker.Engine`; all prompts have one length."""
        prompts = torch.tensor(prompt_tokens, device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out[:, prompts.shape[1] :].tolist()
        return Generated(time.perf_counter() - started, tokens)

    def parts(self) -> dict[str, float]:
        """See `engine_worker.Engine`: it counts none."""
        return {}

    def limits(self) -> dict[str, float]:
        """See `engine_worker.Engine`: `gpu.py` measures them."""
        return {}
