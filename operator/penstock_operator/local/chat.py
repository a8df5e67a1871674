"""A chat in the terminal against the OpenAI API of a service."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, TextIO

import httpx

from penstock_operator.errors import ServiceFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 600.0
"""Longest wait for the next piece of an answer; routers send a comment well before."""


class Chat:
    """Keeps the conversation. The answer is printed as it comes."""

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, system: str | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._model = model
        self._messages = [{"role": "system", "content": system}] if system else []

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer in pieces. Raises ServiceFailed with what the API said."""
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {"model": self._model, "messages": messages, "stream": True}
        answer = ""
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    raise ServiceFailed(_api_error(response))
                for line in response.iter_lines():
                    piece = _piece(line)
                    answer += piece
                    if piece:
                        yield piece
        except httpx.HTTPError as error:
            raise ServiceFailed(
                f"the connection to {self._client.base_url} failed: {error}",
                remedy="see `penstock get` and `penstock logs router`",
            ) from error
        self._messages = [*messages, {"role": "assistant", "content": answer}]


def converse(chat: Chat, questions: TextIO) -> None:
    """Ask every line of `questions` in turn; with a terminal, until Ctrl-D."""
    terminal = questions.isatty()
    while True:
        if terminal:
            print("you> ", end="", flush=True)
        line = questions.readline()
        if not line:
            break
        if line.strip():
            answer(chat, line.strip())


def answer(chat: Chat, question: str) -> None:
    """Print the answer to one question as it comes; Ctrl-C ends it early."""
    try:
        for piece in chat.ask(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()


def _piece(line: str) -> str:
    """Return the text in one line of the event stream. Raises ServiceFailed for an error event."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return ""
    try:
        event = json.loads(data)
        if "error" in event:
            raise ServiceFailed(f"the answer broke off: {event['error'].get('message')}")
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceFailed(f"the API sent something that is no completion: {line!r}") from error


def _api_error(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"the API answered {response.status_code}: {message}"
