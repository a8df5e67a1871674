"""The whole router with the official client, over HTTP, on fake workers."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import openai
import pytest

from penstock_wire.messages import Failed, Generate, Load, unpack_tokens
from tests.unit.router.fake_worker import (
    FakeCluster,
    decode_worker,
    groups_sent,
    prefill_worker,
    script,
)
from tests.unit.router.harness import MODEL, Service, eventually, serving
from tests.unit.router.tiny_models import byte_level, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = byte_level()
END: int = TOKENIZER.token_to_id("<|end|>") or 0
HI: list[Any] = [{"role": "user", "content": "hello world"}]


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


async def stream_text(service: Service, **options: Any) -> str:
    stream = await service.openai.chat.completions.create(
        model=MODEL, messages=HI, stream=True, **options
    )
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


async def test_a_chat_is_answered_in_whole_and_streamed(checkpoint: Path) -> None:
    worker = decode_worker(choose=script([*ids("the lazy dog 你好🙂"), END]), cached_tokens=3)
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        whole = await service.openai.chat.completions.create(model=MODEL, messages=HI)
        assert whole.choices[0].message.content == "the lazy dog 你好🙂"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        prompt = ids("<s><|user|>hello world<|end|><|assistant|>")
        assert whole.usage.prompt_tokens == len(prompt)
        assert whole.usage.completion_tokens == len(ids("the lazy dog 你好🙂")) + 1
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 3
        assert list(unpack_tokens(worker.generates()[0].tokens)) == prompt

        stream = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "the lazy dog 你好🙂"
    assert "\ufffd" not in text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


async def test_a_plain_completion_continues_its_prompt(checkpoint: Path) -> None:
    worker = decode_worker(choose=script(ids(" brown fox")))
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        answer = await service.openai.completions.create(
            model=MODEL, prompt="the quick", max_tokens=len(ids(" brown fox"))
        )
        assert answer.choices[0].text == " brown fox"
        assert answer.choices[0].finish_reason == "length"
        default = await service.openai.completions.create(model=MODEL, prompt=ids("the quick"))
        assert default.usage is not None
        assert default.usage.completion_tokens == 16
    first, second = worker.generates()
    bos = TOKENIZER.token_to_id("<s>")
    assert list(unpack_tokens(first.tokens)) == [bos, *ids("the quick")]
    assert list(unpack_tokens(second.tokens)) == ids("the quick")


async def test_64_at_once_all_get_their_own_answer(checkpoint: Path) -> None:
    workers = [decode_worker(f"decode-{n}") for n in range(2)]
    async with serving(FakeCluster(*workers), checkpoint) as service:
        await service.until_ready()

        async def ask(n: int, *, stream: bool) -> str:
            prompt = f"the lazy dog {n}"
            if not stream:
                whole = await service.openai.completions.create(
                    model=MODEL, prompt=prompt, seed=n, max_tokens=20
                )
                return whole.choices[0].text
            parts = await service.openai.completions.create(
                model=MODEL, prompt=prompt, seed=n, max_tokens=20, stream=True
            )
            return "".join([part.choices[0].text async for part in parts])

        streamed = await asyncio.gather(*(ask(n, stream=True) for n in range(64)))
        whole = await asyncio.gather(*(ask(n, stream=False) for n in range(64)))
        assert service.router.proxy.waiting == service.router.proxy.running == 0
    assert streamed == whole
    assert len(set(streamed)) == 64
    assert all(worker.generates() for worker in workers)


@pytest.mark.parametrize("per_message", [1, 3])
async def test_a_lost_worker_does_not_change_the_stream(checkpoint: Path, per_message: int) -> None:
    workers = [decode_worker(f"decode-{n}", per_message=per_message) for n in range(2)]
    async with serving(FakeCluster(*workers), checkpoint) as service:
        await service.until_ready()
        expected = await stream_text(service, seed=7, max_tokens=40)
        for worker in workers:
            worker.received.clear()
            worker.pause_at = 15
        streaming = asyncio.create_task(stream_text(service, seed=7, max_tokens=40))
        waits = [asyncio.create_task(worker.paused.wait()) for worker in workers]
        await asyncio.wait(waits, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        victim = next(worker for worker in workers if worker.paused.is_set())
        for wait in waits:
            wait.cancel()
        survivor = workers[1 - workers.index(victim)]
        survivor.pause_at = None
        victim.kill()
        assert await streaming == expected
        resumed = survivor.generates()[-1]
        assert len(unpack_tokens(resumed.output)) == 15 // per_message * per_message
        text = (await service.http.get("/metrics")).text
    assert 'penstock_retries_total{reason="lost"} 1.0' in text


async def test_both_workers_may_die_in_turn(checkpoint: Path) -> None:
    workers = [decode_worker(f"decode-{n}") for n in range(2)]
    async with serving(FakeCluster(*workers), checkpoint) as service:
        await service.until_ready()
        expected = await stream_text(service, seed=3, max_tokens=30)
        for worker in workers:
            worker.received.clear()
            worker.gate.clear()
        streaming = asyncio.create_task(stream_text(service, seed=3, max_tokens=30))
        for worker in sorted(workers, key=lambda w: not w.received):
            await worker.until(lambda w=worker: bool(w.generates()))  # type: ignore[misc]
            worker.kill()
        await asyncio.sleep(0)  # now nobody is there, and the request waits
        workers[0].gate.set()
        workers[0].restart()
        assert await streaming == expected


async def test_without_workers_a_request_waits_and_then_gets_503(checkpoint: Path) -> None:
    async with serving(FakeCluster(), checkpoint, worker_wait_seconds=0.05) as service:
        with pytest.raises(openai.InternalServerError) as caught:
            await service.openai.chat.completions.create(model=MODEL, messages=HI)
        ready = await service.http.get("/ready")
    assert caught.value.status_code == 503
    assert caught.value.code == "no_worker"
    assert ready.status_code == 503
    told = ready.json()
    assert told.pop("idle_seconds") >= 0
    assert told == {
        "ready": False,
        "reasons": ["no decode worker is listed by discovery"],
        "message": "no decode worker is listed by discovery",
        "waking": False,
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_cancels_at_the_worker(checkpoint: Path, stream: bool) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        worker.pause_at = 5
        request = service.post(
            "/v1/chat/completions", {"model": MODEL, "messages": HI, "stream": stream}
        )
        task = asyncio.create_task(request)
        await asyncio.wait_for(worker.paused.wait(), 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await worker.until(lambda: bool(worker.cancelled()), seconds=1.0)
        assert worker.cancelled() == [worker.generates()[0].request_id]
        assert not worker.running
        await eventually(lambda: not service.router.proxy.running, seconds=1)
        text = (await service.http.get("/metrics")).text
    assert 'outcome="cancelled"' in text


async def test_n_choices_differ_and_are_repeatable(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        whole = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, n=3, seed=11, max_tokens=12
        )
        texts = [choice.message.content for choice in whole.choices]
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert len(set(texts)) == 3
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 36
        assert whole.usage.prompt_tokens == len(unpack_tokens(worker.generates()[0].tokens))
        streamed = ["", "", ""]
        stream = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, n=3, seed=11, max_tokens=12, stream=True
        )
        async for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == texts
        single = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, seed=11, max_tokens=12
        )
        assert single.choices[0].message.content == texts[0]


async def test_several_prompts_of_one_request(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        both = await service.openai.completions.create(
            model=MODEL, prompt=["hello", "world"], n=2, seed=1, max_tokens=4
        )
        alone = await service.openai.completions.create(
            model=MODEL, prompt="hello", seed=1, max_tokens=4
        )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == alone.choices[0].text
    assert both.usage is not None
    assert alone.usage is not None
    assert both.usage.prompt_tokens > alone.usage.prompt_tokens
    assert both.usage.completion_tokens == 16


async def test_stop_strings_across_tokens_end_the_request_early(checkpoint: Path) -> None:
    text = "the quick brown fox"
    worker = decode_worker(choose=script(ids(text), then=ids("z")[0]))
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        whole = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, stop=["own f", "never"], max_tokens=400
        )
        assert whole.choices[0].message.content == "the quick br"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= len(ids(text))
        assert await stream_text(service, stop="own f", max_tokens=400) == "the quick br"
        await worker.until(lambda: len(worker.cancelled()) == 2)


async def test_logprobs_in_both_shapes(checkpoint: Path) -> None:
    worker = decode_worker(choose=script([*ids("hello 🙂"), END]))
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        chat = await service.openai.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=2
        )
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
        assert joined.decode() == "hello 🙂"
        assert all(entry.logprob == -0.5 for entry in logprobs.content)
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
        plain = await service.openai.completions.create(
            model=MODEL, prompt="x", logprobs=1, max_tokens=50
        )
        stream = await service.openai.completions.create(
            model=MODEL, prompt="x", logprobs=1, max_tokens=50, stream=True
        )
        parts = [part.choices[0].logprobs async for part in stream]
    found = plain.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.tokens[0] == "hello"
    assert found.tokens[-1].startswith("bytes:\\x") or found.tokens[-1].endswith("🙂")
    assert found.token_logprobs == [-0.5] * len(found.tokens)
    assert found.text_offset is not None
    assert found.text_offset[:2] == [0, 5]
    offsets = [offset for part in parts if part and part.text_offset for offset in part.text_offset]
    assert offsets == found.text_offset


async def test_a_retriable_failure_is_retried_elsewhere(checkpoint: Path) -> None:
    refusal = Failed(request_id="", code="draining", message="bye", retriable=True)
    workers = [decode_worker("decode-0", refuse=refusal), decode_worker("decode-1")]
    async with serving(FakeCluster(*workers), checkpoint) as service:
        await service.until_ready()
        for _ in range(8):
            await service.openai.chat.completions.create(model=MODEL, messages=HI, max_tokens=3)
    assert workers[0].generates()
    assert len(workers[1].generates()) == 8


@pytest.mark.parametrize(
    ("failed", "status", "code"),
    [
        (
            Failed(request_id="", code="overloaded", message="full", retriable=True),
            429,
            "overloaded",
        ),
        (Failed(request_id="", code="internal", message="bug", retriable=False), 500, "internal"),
        (
            Failed(request_id="", code="too_long", message="too long", retriable=False),
            400,
            "context_length_exceeded",
        ),
    ],
)
async def test_failures_of_workers_become_http_errors(
    checkpoint: Path, failed: Failed, status: int, code: str
) -> None:
    worker = decode_worker(refuse=failed)
    async with serving(FakeCluster(worker), checkpoint, max_attempts=2) as service:
        await service.until_ready()
        for stream in (False, True):
            answer = await service.post(
                "/v1/chat/completions", {"model": MODEL, "messages": HI, "stream": stream}
            )
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            assert (status == 429) == ("retry-after" in answer.headers)


async def test_a_failure_in_mid_stream_is_an_event(checkpoint: Path) -> None:
    worker = decode_worker(choose=script([], then=ids("x")[0]))  # every token is text at once
    async with serving(FakeCluster(worker), checkpoint, worker_wait_seconds=0.05) as service:
        await service.until_ready()
        worker.pause_at = 4
        stream = await service.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
        for _ in range(4):
            await anext(stream)
        worker.kill()
        with pytest.raises(openai.APIError, match="could take the request"):
            await anext(stream)


async def test_a_full_queue_is_429_with_retry_after(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint, max_queue=2) as service:
        await service.until_ready()
        worker.gate.clear()
        waiting = [asyncio.create_task(stream_text(service, max_tokens=2)) for _ in range(2)]
        await worker.until(lambda: len(worker.generates()) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            await service.openai.chat.completions.create(model=MODEL, messages=HI)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        worker.gate.set()
        assert all(await asyncio.gather(*waiting))


async def test_a_worker_that_stalls_is_504_and_cancelled(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint, stall_seconds=0.05) as service:
        await service.until_ready()
        worker.gate.clear()
        answer = await service.post("/v1/chat/completions", {"model": MODEL, "messages": HI})
        assert answer.status_code == 504
        await worker.until(lambda: bool(worker.cancelled()))


async def test_a_silent_stream_gets_its_headers_and_comments(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint, keepalive_seconds=0.02) as service:
        await service.until_ready()
        worker.gate.clear()
        body = {"model": MODEL, "messages": HI, "stream": True, "max_tokens": 2}
        async with service.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.aiter_lines()
            assert await anext(lines) == ": keep-alive"
            worker.gate.set()
            data = [line async for line in lines if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    assert json.loads(data[0].removeprefix("data: "))["choices"][0]["delta"]["content"]


async def test_prefill_groups_are_announced_probed_and_used(checkpoint: Path) -> None:
    decode = decode_worker()
    group = prefill_worker("group-0")
    cluster = FakeCluster(decode, group)
    async with serving(cluster, checkpoint, require_prefill=True) as service:
        await decode.until(lambda: groups_sent(decode)[-1:] == [("group-0",)])
        answer = await service.http.get("/ready")
        assert answer.status_code == 503
        assert "links to all stages" in answer.json()["reasons"][0]
        decode.load = Load(
            state="ready", pages_free=100, pages_total=100, groups_ready=("group-0",)
        )
        decode.publish(decode.load)
        await service.until_ready()
        canaries = [m for m in decode.received if isinstance(m, Generate)]
        assert {(m.group, m.force_group) for m in canaries} == {("", False), ("group-0", True)}
        assert len({m.salt for m in canaries}) == 2
        await stream_text(service, max_tokens=2)
        assert decode.generates()[-1].group == "group-0"
        group.kill()
        assert (await service.http.get("/ready")).status_code == 503
        group.restart()
        await service.until_ready()


async def test_a_failed_canary_is_a_reason(checkpoint: Path) -> None:
    worker = decode_worker(choose=lambda generate, position: 1 // 0)
    async with serving(FakeCluster(worker), checkpoint, canary_seconds=0.05) as service:
        readiness = service.router.readiness
        await eventually(lambda: "no token within" in readiness.reasons()[0])
        answer = await service.http.get("/ready")
    assert answer.status_code == 503
    assert "canary of decode-0 failed" in answer.json()["reasons"][0]


BAD_CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content",
    ),
    (
        {"messages": [*HI, {"role": "system", "content": "late"}]},
        400,
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "hello " * 600}]}, 400, "messages"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"min_p": 2}, 400, "min_p"),
    ({"n": 0}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"n": 1000}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 100_000}, 400, "max_tokens"),
    ({"max_completion_tokens": 100_000}, 400, "max_completion_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"frequency_penalty": "1"}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"seed": 2**64}, 400, "seed"),
    ({"seed": 1.5}, 400, "seed"),
    ({"stop": 5}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids[0]"),
    ({"stop_token_ids": [99999]}, 400, "stop_token_ids"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"temprature": 1}, 400, "temprature"),
]


async def test_bad_chats_are_refused_with_the_parameter_named(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        for change, status, param in BAD_CHATS:
            body = {"model": MODEL, "messages": HI} | change
            answer = await service.post("/v1/chat/completions", body)
            assert answer.status_code == status, (change, answer.text)
            error = answer.json()["error"]
            assert error["param"] == param, (change, error)
            assert error["message"]
            assert error["type"] == "invalid_request_error"
            assert error["code"]
    assert worker.generates() == []


async def test_bad_completions_are_refused(checkpoint: Path) -> None:
    worker = decode_worker()
    bad: list[tuple[Any, str]] = [
        ([], "prompt"),
        ([[]], "prompt"),
        ([1, "x"], "prompt"),
        ({"a": 1}, "prompt"),
        ([99999], "prompt"),
        ([-1], "prompt"),
        ("hello " * 600, "prompt"),
        (None, "prompt"),
    ]
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()
        for prompt, param in bad:
            answer = await service.post("/v1/completions", {"model": MODEL, "prompt": prompt})
            assert answer.status_code == 400, (prompt, answer.text)
            assert answer.json()["error"]["param"] == param
        for param, value in [("echo", True), ("logprobs", 21)]:
            body = {"model": MODEL, "prompt": "x", param: value}
            answer = await service.post("/v1/completions", body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
    assert worker.generates() == []


async def test_what_has_no_effect_is_accepted(checkpoint: Path) -> None:
    async with serving(FakeCluster(decode_worker()), checkpoint) as service:
        await service.until_ready()
        body = {
            "model": MODEL,
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
                *HI,
                {"role": "assistant", "content": "yes", "refusal": None},
                *HI,
            ],
            "user": "somebody",
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "store": False,
            "logprobs": None,
            "top_k": -1,
            "logit_bias": {"5": -100},
            "max_tokens": 2,
        }
        assert (await service.post("/v1/chat/completions", body)).status_code == 200


async def test_bad_http_is_answered_in_openai_shape(checkpoint: Path) -> None:
    async with serving(FakeCluster(decode_worker()), checkpoint, max_body_bytes=1000) as service:
        url = "/v1/chat/completions"
        for content in (b"", b"{", b"\xff\xfe", b"[]", b'"x"', b"[" * 900):
            answer = await service.http.post(url, content=content)
            assert answer.status_code == 400, content
            assert answer.json()["error"]["code"] == "invalid_json"
        answer = await service.http.post(url, content=b"x" * 1001)
        assert answer.status_code == 413

        async def chunks() -> Any:
            for _ in range(3):
                yield b"x" * 500

        answer = await service.http.post(url, content=chunks())
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        for method, path, status in [
            ("GET", "/nowhere", 404),
            ("GET", url, 405),
            ("POST", "/v1/models", 405),
            ("GET", "/v1/models/other", 404),
        ]:
            answer = await service.http.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


async def test_models_tokenize_detokenize_health(checkpoint: Path) -> None:
    async with serving(FakeCluster(decode_worker(max_model_len=99)), checkpoint) as service:
        assert (await service.http.get("/health")).json() == {"status": "ok"}
        await service.until_ready()
        ready = (await service.http.get("/ready")).json()
        assert ready.pop("idle_seconds") >= 0
        assert ready == {
            "ready": True,
            "reasons": [],
            "message": "requests are answered",
            "waking": False,
        }
        models = await service.openai.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await service.openai.models.retrieve(MODEL)).id == MODEL
        made = (await service.post("/tokenize", {"prompt": "hello world"})).json()
        bos = TOKENIZER.token_to_id("<s>")
        assert made == {
            "tokens": [bos, *ids("hello world")],
            "count": len(ids("hello world")) + 1,
            "max_model_len": 99,
        }
        chat = (await service.post("/tokenize", {"messages": HI})).json()
        assert chat["tokens"] == ids("<s><|user|>hello world<|end|><|assistant|>")
        back = await service.post("/detokenize", {"tokens": ids("hello world")})
        assert back.json() == {"prompt": "hello world"}
        for body in ({}, {"prompt": "x", "messages": HI}, {"prompt": 5}):
            assert (await service.post("/tokenize", body)).status_code == 400
        bad = await service.post("/detokenize", {"tokens": [99999]})
        assert bad.json()["error"]["param"] == "tokens"


async def test_metrics_tell_what_happened(checkpoint: Path) -> None:
    async with serving(FakeCluster(decode_worker(cached_tokens=4)), checkpoint) as service:
        await service.until_ready()
        await stream_text(service, max_tokens=10)
        text = (await service.http.get("/metrics")).text
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    prompt = len(ids("<s><|user|>hello world<|end|><|assistant|>"))
    assert values["penstock_ttft_seconds_count"] == 1
    assert values["penstock_itl_seconds_count"] == 9
    assert values["penstock_generation_tokens_total"] == 10
    assert values["penstock_prompt_tokens_total"] == prompt
    assert math.isclose(values["penstock_prefix_hit_ratio"], 4 / prompt)
    assert values['penstock_requests_total{endpoint="chat",outcome="200"}'] == 1
    assert values['penstock_worker_ready{role="decode",worker="decode-0"}'] == 1
    assert values["penstock_queue_depth"] == values["penstock_running_requests"] == 0
    assert values["penstock_ready"] == 1


async def test_an_endpoint_that_is_not_listed_any_more_ends_its_streams(checkpoint: Path) -> None:
    old, new = decode_worker("decode-0"), decode_worker("decode-1")
    cluster = FakeCluster(old)
    async with serving(cluster, checkpoint) as service:
        await service.until_ready()
        old.pause_at = 3
        streaming = asyncio.create_task(stream_text(service, seed=1, max_tokens=8))
        await asyncio.wait_for(old.paused.wait(), 10)
        cluster.list(new)
        await new.until(lambda: bool(new.received))
        await service.until_ready()
        assert old.links
        old.gate.set()
        text = await streaming
        assert text == await stream_text(service, seed=1, max_tokens=8)
        assert len(new.generates()) == 1
        await eventually(lambda: not old.links)


async def test_a_client_that_leaves_at_once_leaves_nothing_behind(checkpoint: Path) -> None:
    worker = decode_worker()
    async with serving(FakeCluster(worker), checkpoint) as service:
        await service.until_ready()

        async def leave() -> None:
            body = {"model": MODEL, "messages": HI, "stream": True, "max_tokens": 400}
            async with service.http.stream("POST", "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    return

        worker.pause_at = 50
        await asyncio.gather(*(leave() for _ in range(20)))
        proxy = service.router.proxy
        await eventually(lambda: not (proxy.running or proxy.waiting or worker.running), seconds=1)


async def test_the_client_library_knows_the_errors(checkpoint: Path) -> None:
    async with serving(FakeCluster(decode_worker()), checkpoint) as service:
        await service.until_ready()
        with pytest.raises(openai.NotFoundError) as missing:
            await service.openai.chat.completions.create(model="other", messages=HI)
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            await service.openai.chat.completions.create(model=MODEL, messages=HI, temperature=9)
        assert bad.value.param == "temperature"


async def test_a_request_is_not_lost_for_want_of_a_prefill_group(checkpoint: Path) -> None:
    """It goes to a decode worker alone in the end, while /ready says what is missing."""
    worker = decode_worker()
    async with serving(
        FakeCluster(worker), checkpoint, require_prefill=True, group_wait_seconds=0.2
    ) as service:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2}
        response = await service.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        assert [g.group for g in worker.generates()] == [""]
        ready = await service.http.get("/ready")
        assert ready.status_code == 503
        assert "no decode worker has links to all stages" in ready.json()["reasons"][0]
