"""The two completion endpoints, from a parsed request to the bytes of its answer."""

from __future__ import annotations

import secrets
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from msgspec import structs

from penstock_router.errors import NotFound
from penstock_router.openai import prompts
from penstock_router.openai.choices import Choice, Delta
from penstock_router.openai.merge import merged
from penstock_router.openai.responses import (
    ChatFormat,
    CompletionFormat,
    Format,
    Gathered,
    Usage,
    Writer,
)
from penstock_router.openai.schemas import ChatRequest, CompletionRequest
from penstock_router.proxy import Job
from penstock_wire.messages import pack_tokens

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncGenerator, Sequence

    from penstock_router.metrics import Metrics
    from penstock_router.proxy import Proxy
    from penstock_router.served_model import ServedModel
    from penstock_router.workers import Fleet


class Answer:
    """An answer that is about to be generated; use `events` or `whole`, once.

    Args:
        choices: those of the first prompt, then those of the second, and so on.
        per_prompt: choices a prompt.
        writer: of the response.
        proxy: generates.
        metrics: counts tokens.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        per_prompt: int,
        writer: Writer,
        proxy: Proxy,
        metrics: Metrics,
    ) -> None:
        self._choices = choices
        self._per_prompt = per_prompt
        self._writer = writer
        self._proxy = proxy
        self._metrics = metrics

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield server-sent events. Raises ApiError, at first or in mid-stream."""
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    yield self._writer.event(delta)
            yield self._writer.end(self._usage())
        finally:
            self._count()

    async def whole(self) -> bytes:
        """Return the JSON of the whole answer. Raises ApiError."""
        gathered = [Gathered() for _ in self._choices]
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    gathered[delta.index].add(delta)
            return self._writer.answer(gathered, self._usage())
        finally:
            self._count()

    def _deltas(self) -> AsyncGenerator[Delta]:
        return merged([choice.deltas(self._proxy) for choice in self._choices])

    def _usage(self) -> Usage:
        """Return the usage, in which a prompt counts once.

        Of its choices the one that found least of it cached counts: the others may owe their hits
        to that one.
        """
        starts = range(0, len(self._choices), self._per_prompt)
        by_prompt = [self._choices[start : start + self._per_prompt] for start in starts]
        return Usage(
            prompt=sum(len(same[0].job.tokens) // 4 for same in by_prompt),
            generated=sum(choice.generated for choice in self._choices),
            cached=sum(min(choice.cached_tokens for choice in same) for same in by_prompt),
        )

    def _count(self) -> None:
        for choice in self._choices:
            self._metrics.finished(
                prompt=len(choice.job.tokens) // 4,
                cached=choice.cached_tokens,
                generated=choice.generated,
            )


class CompletionService:
    """Turns requests into answers.

    Args:
        model: the model served.
        fleet: tells how long contexts may be.
        proxy: generates.
        metrics: counts tokens.
    """

    def __init__(self, model: ServedModel, fleet: Fleet, proxy: Proxy, metrics: Metrics) -> None:
        self.model = model
        self._fleet = fleet
        self._proxy = proxy
        self._metrics = metrics

    def check_model(self, name: str | None) -> None:
        """Raise NotFound unless `name` is the served model (None: whichever there is)."""
        if name is not None and name != self.model.name:
            raise NotFound(
                f"the model '{name}' does not exist; this service has '{self.model.name}'",
                param="model",
                code="model_not_found",
            )

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and output may have together."""
        known = self._fleet.context_limit()
        return self.model.max_model_len if known is None else min(known, self.model.max_model_len)

    async def chat(self, request: ChatRequest, arrived: float) -> Answer:
        """Return the answer to a conversation. Raises ApiError."""
        self._check(request)
        tokens = await prompts.chat_prompt(self.model, request)
        form = ChatFormat(self.model.tokenizer, logprobs=request.logprobs)
        return self._answer(request, [tokens], form, arrived)

    async def completion(self, request: CompletionRequest, arrived: float) -> Answer:
        """Return the continuations of one or more prompts. Raises ApiError."""
        self._check(request)
        tokens = [
            await prompts.completion_prompt(self.model, request, prompt)
            for prompt in request.prompt
        ]
        form = CompletionFormat(self.model.tokenizer, logprobs=request.logprobs is not None)
        return self._answer(request, tokens, form, arrived)

    def _check(self, request: ChatRequest | CompletionRequest) -> None:
        self.check_model(request.model)
        prompts.check_stream_options(request)
        self._proxy.check_queue()

    def _answer(
        self,
        request: ChatRequest | CompletionRequest,
        prompts_: Sequence[array[int]],
        form: Format,
        arrived: float,
    ) -> Answer:
        request_id = f"{form.prefix}-{secrets.token_hex(12)}"
        choices = [
            choice
            for at, tokens in enumerate(prompts_)
            for choice in self._choices(request, tokens, request_id, at * request.n, arrived)
        ]
        options = request.stream_options
        writer = Writer(
            form,
            request_id=request_id,
            created=int(time.time()),
            model=request.model,
            usage_chunk=options is not None and options.include_usage,
        )
        self._metrics.prepare.observe(time.monotonic() - arrived)
        return Answer(
            choices,
            per_prompt=request.n,
            writer=writer,
            proxy=self._proxy,
            metrics=self._metrics,
        )

    def _choices(
        self,
        request: ChatRequest | CompletionRequest,
        tokens: array[int],
        request_id: str,
        first: int,
        arrived: float,
    ) -> list[Choice]:
        """Return the choices of one prompt, numbered from `first`."""
        limit = prompts.max_output(request, len(tokens), self.context_limit)
        sampling = prompts.sampling(self.model, request, max_tokens=limit)
        packed = pack_tokens(tokens)
        # A plain completion continues its prompt's text; a chat's answer is a text of its own.
        context = () if isinstance(request, ChatRequest) else tokens
        return [
            Choice(
                first + at,
                Job(
                    request_id=f"{request_id}-{first + at}",
                    tokens=packed,
                    sampling=structs.replace(
                        sampling, seed=prompts.reseeded(sampling.seed, first + at)
                    ),
                    salt=request.cache_salt.encode(),
                    arrived=arrived,
                ),
                detokenizer=self.model.tokenizer.detokenizer(
                    context=context, skip_special_tokens=request.skip_special_tokens
                ),
                stops=request.stop,
            )
            for at in range(request.n)
        ]
