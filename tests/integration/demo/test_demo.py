"""The demo remembers: a wrong KV page, anywhere, is a wrong answer here."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI

from tests.integration.demo.conftest import load

if TYPE_CHECKING:
    from types import ModuleType

    from tests.integration.demo.conftest import Demo

pytestmark = pytest.mark.timeout(240)
MODEL = "penstock-demo"


def client(demo: Demo) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120)


def facts(training: ModuleType, seed: int, count: int) -> list[tuple[str, str]]:
    drawn: list[tuple[str, str]] = training.draw_facts(random.Random(seed), count)
    return drawn


def ask(training: ModuleType, known: list[tuple[str, str]], request: str) -> list[Any]:
    return [{"role": "user", "content": f"Remember: {training.facts_text(known)} {request}"}]


async def answer(api: AsyncOpenAI, messages: list[Any], **options: Any) -> Any:
    return await api.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, **options
    )


async def test_the_readmes_first_answer(demo: Demo) -> None:
    async with client(demo) as api:
        words = "Remember: falcon is copper. river is lantern. What is river?"
        reply = await answer(api, [{"role": "user", "content": words}])
    assert reply.choices[0].message.content == "Sure, river is lantern."
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("count", [10, 120, 500])
async def test_a_fact_at_any_depth_of_a_long_prompt(
    demo: Demo, training: ModuleType, count: int
) -> None:
    known = facts(training, count, count)
    places = [0, count // 3, 2 * count // 3, count - 1]
    async with client(demo) as api:
        replies = await asyncio.gather(
            *(answer(api, ask(training, known, training.question(known[p][0]))) for p in places)
        )
    for place, reply in zip(places, replies, strict=True):
        assert reply.choices[0].message.content == training.answer([known[place]])
        assert reply.usage.prompt_tokens > 3 * count


async def test_a_recital_streams_word_for_word(demo: Demo, training: ModuleType) -> None:
    known = facts(training, 7, 80)
    async with client(demo) as api:
        stream = await answer(
            api,
            ask(training, known, training.REPEAT),
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces: list[str] = []
        usage: Any = None
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
    assert "".join(pieces) == training.answer(known)
    assert len(pieces) > 100
    assert usage.completion_tokens > 240


async def test_a_second_turn_finds_the_first_in_the_cache(demo: Demo, training: ModuleType) -> None:
    known = facts(training, 8, 50)
    messages = ask(training, known, training.question(known[3][0]))
    async with client(demo) as api:
        first = await answer(api, messages)
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": training.question(known[40][0])},
        ]
        second = await answer(api, messages)
    assert second.choices[0].message.content == training.answer([known[40]])
    assert second.usage.prompt_tokens_details.cached_tokens > 180


async def test_64_at_once_streaming_and_not(demo: Demo, training: ModuleType) -> None:
    async def one(api: AsyncOpenAI, i: int) -> tuple[str, str]:
        known = facts(training, 100 + i, 5 + i)
        wanted = known[i % len(known)]
        messages = ask(training, known, training.question(wanted[0]))
        if i % 2:
            stream = await answer(api, messages, stream=True)
            parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            return "".join(parts), training.answer([wanted])
        reply = await answer(api, messages)
        return reply.choices[0].message.content, training.answer([wanted])

    async with client(demo) as api:
        pairs = await asyncio.gather(*(one(api, i) for i in range(64)))
    assert [got for got, _ in pairs] == [expected for _, expected in pairs]


def test_commands_show_what_runs(demo: Demo) -> None:
    columns, row = demo.penstock("get").splitlines()[:2]
    assert columns.split()[:4] == ["NAME", "MODEL", "READY", "REASON"]
    assert row.split()[:3] == [MODEL, MODEL, "True"]
    service = load(demo.penstock("get", "-o", "json"))["items"][0]
    conditions = {c["type"]: c["status"] for c in service["status"]["conditions"]}
    assert {conditions[name] for name in ("Ready", "PrefillReady", "KVTransferReady")} == {"True"}
    processes = load(demo.penstock("ps", "-o", "json"))
    assert sorted(p["role"] for p in processes) == ["decode", "prefill", "prefill", "router"]
    assert "StatefulSet" in demo.penstock("render")
    assert "is ready" in demo.penstock("logs", "decode")
    assert "Sure, river is lantern." in demo.penstock(
        "chat", "Remember: falcon is copper. river is lantern. What is river?"
    )
