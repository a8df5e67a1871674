"""From a request to the jobs that answer it: render, tokenize, check lengths, set sampling."""

from __future__ import annotations

import asyncio
import secrets
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

from penstock_router.errors import InvalidRequest
from penstock_router.openai.schemas import ChatRequest, CompletionRequest, Message
from penstock_wire.messages import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from penstock_router.served_model import ServedModel

_THREAD_CHARACTERS = 8192
"""Longer texts are tokenized in a thread (about 1 ms of work), so that streams keep flowing."""

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for plain completions."""


def render_chat(model: ServedModel, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    """Return the prompt's text of a conversation. Raises InvalidRequest."""
    if model.chat_template is None:
        raise InvalidRequest(
            f"the model '{model.name}' has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    return model.chat_template.render([message.rendered() for message in messages], options)


async def encode(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of `text`, without holding up the event loop."""
    tokenizer = model.tokenizer
    if len(text) <= _THREAD_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def chat_prompt(model: ServedModel, request: ChatRequest) -> array[int]:
    """Return the tokens of a conversation; special tokens are what the template spells out."""
    text = render_chat(model, request.messages, request.chat_template_kwargs)
    return array("i", await encode(model, text, add_special_tokens=False))


async def completion_prompt(
    model: ServedModel, request: CompletionRequest, prompt: str | list[int]
) -> array[int]:
    """Return the tokens of a plain prompt. Raises InvalidRequest for ids outside the vocabulary."""
    if isinstance(prompt, str):
        ids = await encode(model, prompt, add_special_tokens=request.add_special_tokens)
    else:
        ids = prompt
        check_ids(model, ids, "prompt")
    return array("i", ids)


def check_ids(model: ServedModel, ids: Sequence[int], param: str) -> None:
    """Raise InvalidRequest if an id is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"the token id {token} is not in the vocabulary of {model.vocab_size} tokens",
                param=param,
                code="invalid_value",
            )


def check_stream_options(request: ChatRequest | CompletionRequest) -> None:
    """Raise InvalidRequest if options of a stream are given without one."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "stream_options needs stream to be true", param="stream_options", code="invalid_value"
        )


def max_output(request: ChatRequest | CompletionRequest, prompt_tokens: int, limit: int) -> int:
    """Return how many tokens may be generated behind a prompt.

    Raises:
        InvalidRequest: prompt and output do not fit into `limit` tokens, or the prompt is empty.
    """
    chat = isinstance(request, ChatRequest)
    param = "messages" if chat else "prompt"
    if not prompt_tokens:
        raise InvalidRequest("the prompt has no tokens", param=param, code="invalid_value")
    if prompt_tokens >= limit:
        raise InvalidRequest(
            f"this model's context length is {limit} tokens, and the {param} have "
            f"{prompt_tokens}; shorten the {param} so that there is room for an answer",
            param=param,
            code="context_length_exceeded",
        )
    room = limit - prompt_tokens
    asked, name = _asked_tokens(request)
    if asked is None:
        return room if chat else min(room, COMPLETION_TOKENS)
    if asked > room:
        raise InvalidRequest(
            f"this model's context length is {limit} tokens; with {prompt_tokens} tokens in the "
            f"{param}, {name} may be at most {room}, not {asked}",
            param=name,
            code="context_length_exceeded",
        )
    return asked


def _asked_tokens(request: ChatRequest | CompletionRequest) -> tuple[int | None, str]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    return request.max_tokens, "max_tokens"


def sampling(
    model: ServedModel, request: ChatRequest | CompletionRequest, *, max_tokens: int
) -> Sampling:
    """Return how the first choice is sampled; `reseeded` makes the others'.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {request.min_tokens}, more than the {max_tokens} that may be generated",
            param="min_tokens",
            code="invalid_value",
        )
    check_ids(model, list(request.logit_bias), "logit_bias")
    check_ids(model, request.stop_token_ids, "stop_token_ids")
    eos = () if request.ignore_eos else model.eos_ids
    seed = secrets.randbits(63) if request.seed is None else request.seed & (2**63 - 1)
    return Sampling(
        seed=seed,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(sorted({*eos, *request.stop_token_ids})),
        logprobs=_logprobs(request),
    )


def reseeded(seed: int, index: int) -> int:
    """Return the seed of choice `index`: 0 keeps the request's, the others are derived from it."""
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") & (2**63 - 1)


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest(
            "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )
    return (request.top_logprobs or 0) if request.logprobs else None
