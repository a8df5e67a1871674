"""The JSON of answers. Streams are written by hand around encoded text: a token costs microseconds.

`Format` is what chat and plain completions differ in; the rest of an answer is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_router.openai.choices import Delta
    from penstock_router.openai.tokenizer import TextTokenizer
    from penstock_wire.messages import TokenOut

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of an answer."""

    prompt: int
    generated: int
    cached: int

    def body(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Gathered:
    """A choice that is put together from its deltas, for an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)
    finish: str = ""

    def add(self, delta: Delta) -> None:
        """Append what is new."""
        self.text.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.finish = delta.finish


class Format(Protocol):
    """How one endpoint writes choices."""

    prefix: str
    """Of the answer's id."""
    kind: str
    """The `object` of a whole answer."""
    chunk_kind: str
    """The `object` of a stream's chunk."""

    def chunk(self, delta: Delta, *, first: bool) -> bytes:
        """Return the JSON of a choice in a chunk, without index and finish reason."""
        ...

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        """Return a whole choice, without index and finish reason."""
        ...


class Writer:
    """Writes one answer.

    Args:
        form: chat or plain completion.
        request_id: the answer's id.
        created: Unix time in seconds.
        model: the name that the client asked for.
        usage_chunk: whether the stream ends with a chunk of usage.
    """

    def __init__(
        self, form: Format, *, request_id: str, created: int, model: str, usage_chunk: bool
    ) -> None:
        self._form = form
        self._fields = {"id": request_id, "created": created, "model": model}
        self._usage_chunk = usage_chunk
        head = _encode({**self._fields, "object": form.chunk_kind})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if usage_chunk else b"]}\n\n"
        self._started: set[int] = set()

    def event(self, delta: Delta) -> bytes:
        """Return the server-sent event of `delta`."""
        first = delta.index not in self._started
        self._started.add(delta.index)
        finish = b'"' + delta.finish.encode() + b'"' if delta.finish else b"null"
        return b"".join(
            (
                self._head,
                b'{"index":',
                str(delta.index).encode(),
                b",",
                self._form.chunk(delta, first=first),
                b',"finish_reason":',
                finish,
                b"}",
                self._tail,
            )
        )

    def end(self, usage: Usage) -> bytes:
        """Return the events that end a stream."""
        if not self._usage_chunk:
            return DONE
        return self._head + b'],"usage":' + _encode(usage.body()) + b"}\n\n" + DONE

    def answer(self, choices: Sequence[Gathered], usage: Usage) -> bytes:
        """Return a whole answer."""
        written = [
            {"index": index, **self._form.choice(choice), "finish_reason": choice.finish}
            for index, choice in enumerate(choices)
        ]
        return _encode(
            {
                **self._fields,
                "object": self._form.kind,
                "choices": written,
                "usage": usage.body(),
            }
        )


class ChatFormat:
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def chunk(self, delta: Delta, *, first: bool) -> bytes:
        """Return `"delta": …, "logprobs": …`."""
        role = b'"role":"assistant",' if first else b""
        logprobs = _encode(self._entries(delta.tokens)) if self._logprobs else b"null"
        return b"".join(
            (b'"delta":{', role, b'"content":', _encode(delta.text), b'},"logprobs":', logprobs)
        )

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        """Return the assistant's message."""
        return {
            "message": {"role": "assistant", "content": "".join(gathered.text), "refusal": None},
            "logprobs": self._entries(gathered.tokens) if self._logprobs else None,
        }

    def _entries(self, tokens: Sequence[TokenOut]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(other, value) for other, value in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


class CompletionFormat:
    """/v1/completions."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def chunk(self, delta: Delta, *, first: bool) -> bytes:  # noqa: ARG002 - the interface
        """Return `"text": …, "logprobs": …`."""
        if not self._logprobs:
            return b'"text":' + _encode(delta.text) + b',"logprobs":null'
        start = self._offsets.get(delta.index, 0)
        entries, end = self._entries(delta.tokens, start)
        self._offsets[delta.index] = end
        return b'"text":' + _encode(delta.text) + b',"logprobs":' + _encode(entries)

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        """Return the text."""
        entries = self._entries(gathered.tokens, 0)[0] if self._logprobs else None
        return {"text": "".join(gathered.text), "logprobs": entries}

    def _entries(self, tokens: Sequence[TokenOut], start: int) -> tuple[dict[str, Any], int]:
        """Return the log-probabilities, and where in the output's text the next token begins."""
        names = [self._tokenizer.token_text(token.id) for token in tokens]
        offsets: list[int] = []
        for name in names:
            offsets.append(start)
            start += len(name)
        entries = {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }
        return entries, start

    def _top(self, token: TokenOut) -> dict[str, float]:
        """Return the likeliest tokens by text; of those with the same text the likeliest."""
        top: dict[str, float] = {}
        for other, value in token.top:
            top.setdefault(self._tokenizer.token_text(other), value)
        return top
