"""Streamed completions of token ids, and when their tokens came: what a user of a service sees.

Any server of the OpenAI API can be asked so; Penstock and vLLM are sent the very same fields.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

T = TypeVar("T")
MODEL = "bench"
"""The name that every server gives the model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """When the tokens of one request came, in seconds since it was sent."""

    times: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """To the first token."""
        return self.times[0]

    @property
    def itl(self) -> float:
        """Mean between two tokens."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def connect(url: str, timeout: float) -> httpx.AsyncClient:
    """Return a client with as many connections as it needs, that waits so long for a token."""
    # No proxy of the environment: all servers are on this machine.
    return httpx.AsyncClient(
        base_url=url, timeout=timeout, limits=httpx.Limits(max_connections=None), trust_env=False
    )


def run_client(
    url: str, limit: float, what: str, task: Callable[[httpx.AsyncClient], Awaitable[T]]
) -> T:
    """Run a client of a server. Raises SystemExit if it, told as `what`, fails or takes longer."""

    async def limited() -> T:
        async with asyncio.timeout(limit), connect(url, limit) as client:
            return await task(client)

    try:
        return asyncio.run(limited())
    except (TimeoutError, httpx.HTTPError, ExceptionGroup) as error:
        raise SystemExit(f"{what} failed or took more than {limit:.0f} s: {error!r}") from error


async def ask(client: httpx.AsyncClient, prompt: list[int], count: int) -> Answer:
    """Send one request and read its stream to the end."""
    started = time.perf_counter()
    times = tuple([moment - started async for moment in arrivals(client, prompt, count)])
    if len(times) != count:
        raise SystemExit(f"{len(times)} tokens came, {count} were asked for")
    return Answer(times)


async def arrivals(
    client: httpx.AsyncClient, prompt: list[int], count: int
) -> AsyncGenerator[float]:
    """Send one request and yield the moment, on time.perf_counter, at which each token comes."""
    body = {
        **_body(prompt, count),
        "stream": True,
        # Random tokens are not always whole characters; with this every token is an event.
        "logprobs": 0,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for _ in range(_tokens(line)):
                    yield time.perf_counter()


async def text(client: httpx.AsyncClient, prompt: list[int], count: int) -> str:
    """Send one request and return the text of its answer."""
    response = await client.post("/v1/completions", json=_body(prompt, count))
    if response.status_code != 200:
        raise SystemExit(f"HTTP {response.status_code}: {response.text}")
    return str(response.json()["choices"][0]["text"])


def _body(prompt: list[int], count: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
    }


def _tokens(line: str) -> int:
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise SystemExit(f"the stream ended with an error: {event['error']}")
    logprobs = [choice.get("logprobs") for choice in event["choices"]]
    return sum(len(found["tokens"]) for found in logprobs if found)
