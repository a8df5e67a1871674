"""Streamed completions whose tokens are looked at while they come, and their reference."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from tests.integration.system.checkpoint import EOS, ids

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

TokenIds = tuple[int, ...]


def prompt(seed: int, length: int) -> TokenIds:
    """Return a random prompt."""
    rng = random.Random(seed)
    return tuple(rng.randrange(EOS) for _ in range(length))


def body(tokens: TokenIds, count: int) -> dict[str, Any]:
    """Return a request for exactly `count` greedy tokens."""
    return {
        "model": "tiny",
        "prompt": list(tokens),
        "max_tokens": count,
        "min_tokens": count,
        "temperature": 0,
    }


@dataclass
class Stream:
    """One streamed completion, read by a task of its own."""

    prompt: TokenIds
    count: int
    text: str = ""
    finish: str = ""
    cached: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> TokenIds:
        """What has come so far. The last word may be incomplete until the stream has ended."""
        return ids(self.text)

    async def read(self, client: httpx.AsyncClient) -> TokenIds:
        """Return the whole output. Raises AssertionError on an error, httpx's on a broken line."""
        request = body(self.prompt, self.count) | {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", "/v1/completions", json=request) as response:
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))
        assert self.finish == "length", f"ended with {self.finish!r} after {len(self.tokens)}"
        return self.tokens

    def _take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        if (usage := event.get("usage")) is not None:
            self.cached = usage["prompt_tokens_details"]["cached_tokens"]
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
        self.moved.set()

    async def reaches(self, count: int) -> None:
        """Return when `count` tokens have come. The test's timeout is the deadline."""
        while len(self.tokens) < count:
            self.moved.clear()
            await self.moved.wait()


async def complete(client: httpx.AsyncClient, tokens: TokenIds, count: int) -> TokenIds:
    """Return the output of a request that is not streamed."""
    response = await client.post("/v1/completions", json=body(tokens, count))
    assert response.status_code == 200, response.text
    return ids(response.json()["choices"][0]["text"])


class Reference:
    """What transformers says of the same checkpoint, in float32."""

    def __init__(self, path: Path, *, rounded_to: torch.dtype = torch.float32) -> None:
        """Weights are rounded to `rounded_to` first, as the service loads them."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=rounded_to)
        self._model = model.float().eval()
        self.greedy = lru_cache(maxsize=None)(self._greedy)

    def _greedy(self, tokens: TokenIds, count: int) -> TokenIds:
        """Return exactly `count` greedy tokens; EOS is not among them."""
        with torch.inference_mode():
            sequence = self._model.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=EOS,
            )
        return tuple(sequence[0, len(tokens) :].tolist())

    def all_logits(self, tokens: TokenIds) -> torch.Tensor:
        """Return the logits (tokens, vocabulary) of what follows each token, EOS left out."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(torch.tensor([tokens])).logits[0]
            return logits.index_fill(1, torch.tensor([EOS]), -torch.inf)
