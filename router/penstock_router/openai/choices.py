"""One choice of an answer: tokens in, text out."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_router.openai.stop_strings import StopStrings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from penstock_router.openai.detokenizer import Detokenizer
    from penstock_router.proxy import Job, Proxy, Update
    from penstock_wire.messages import TokenOut


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in a choice."""

    index: int
    text: str
    tokens: Sequence[TokenOut]
    """If log-probabilities were asked for: the tokens behind the text and what is held back."""
    finish: str
    """Empty until the end; then "stop" or "length"."""


class Choice:
    """A completion on its way to the client.

    Args:
        index: its number in the answer.
        job: what is generated.
        detokenizer: of its output.
        stops: stop strings; they and what comes after are not output.
    """

    def __init__(
        self, index: int, job: Job, *, detokenizer: Detokenizer, stops: Sequence[str]
    ) -> None:
        self.index = index
        self.job = job
        self.generated = 0
        """Tokens so far, stop tokens and those of a stop string included."""
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stop_ids = frozenset(job.sampling.stop_token_ids)
        self._logprobs = job.sampling.logprobs is not None

    async def deltas(self, proxy: Proxy) -> AsyncGenerator[Delta]:
        """Generate, and yield what can be shown. Closing the iterator cancels the request."""
        async with aclosing(proxy.generate(self.job)) as updates:
            async for update in updates:
                delta = self._take(update)
                if delta.text or delta.tokens or delta.finish:
                    yield delta
                if delta.finish:
                    return

    def _take(self, update: Update) -> Delta:
        self.cached_tokens = update.cached_tokens
        tokens = self._shown(update)
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self._stops.feed(self._detokenizer.feed(token.id))
            if self._stops.stopped:
                self.generated += count
                return self._delta(text, tokens[:count], "stop")
        self.generated += len(update.tokens)
        finish: str = update.finish
        if finish:
            text += self._stops.feed(self._detokenizer.flush())
            if self._stops.stopped:
                finish = "stop"
            text += self._stops.flush()
        return self._delta(text, tokens, finish)

    def _delta(self, text: str, tokens: Sequence[TokenOut], finish: str) -> Delta:
        return Delta(self.index, text, tokens if self._logprobs else (), finish)

    def _shown(self, update: Update) -> Sequence[TokenOut]:
        """Return the tokens whose text is output: all but the one that ended it."""
        tokens = update.tokens
        if update.finish == "stop" and tokens and tokens[-1].id in self._stop_ids:
            return tokens[:-1]
        return tokens
