"""A constant load of streams whose every answer is known, so that a garbled one is noticed.

The demo model repeats what it was told: half of the streams ask for one fact, half for the whole
list, which takes some hundred tokens, so that there are always streams in flight.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx

from e2e.cluster.waiting import until
from e2e.images.build import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

_ANSWER_SECONDS = 180
"""Silence after which a stream counts as lost."""
_SHORT, _LONG = 10, 60
"""Facts in a question and in a recital."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the only right answer."""

    prompt: str
    answer: str


def question(rng: random.Random) -> Question:
    """Return a question about one of several facts, or for all of them."""
    recital = rng.random() < 0.5
    count = _LONG if recital else _SHORT
    words = rng.sample(_WORDS, 2 * count)
    facts = list(zip(words[::2], words[1::2], strict=True))
    asked = facts if recital else [rng.choice(facts)]
    request = "Repeat the list." if recital else f"What is {asked[0][0]}?"
    return Question(f"Remember: {_told(facts)} {request}", f"Sure, {_told(asked)}")


def _told(facts: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{key} is {value}." for key, value in facts)


async def ask(url: str, model: str, asked: Question) -> str:
    """Stream one answer on a connection of its own and return it.

    Raises httpx.HTTPError if the connection fails, ValueError if the stream says an error or does
    not end as it should.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": asked.prompt}],
        "stream": True,
        "temperature": 0,
    }
    text, finish = "", None
    async with (
        httpx.AsyncClient(timeout=_ANSWER_SECONDS, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(f"error in the stream after {len(text)} letters: {event}")
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
    if finish != "stop":
        raise ValueError(f"ended with {finish!r} after {text!r}")
    return text


@dataclass(slots=True)
class Load:
    """So many streams at once, one after another each, from a thread of its own."""

    url: str
    model: str
    streams: int
    completed: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _broken: BaseException | None = None

    def __enter__(self) -> Self:
        """Start it, and wait for the first answers."""
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()
        try:
            self.goes_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let the open streams end, and start no more."""
        self._stopping.set()
        assert self._thread is not None
        self._thread.join(_ANSWER_SECONDS + 30)
        assert not self._thread.is_alive(), "the load does not end"

    def goes_on(self, answers: int = 5, seconds: float = 120) -> None:
        """Return after so many more right answers.

        Raises AssertionError if one failed, NotInTimeError if they do not come.
        """
        wanted = self.completed + answers
        until(
            f"{answers} more answers",
            lambda: bool(self.failures) or self.completed >= wanted,
            seconds=seconds,
        )
        self.check()

    def check(self) -> None:
        """Raise AssertionError if any stream failed or was garbled so far."""
        assert self._broken is None, repr(self._broken)
        assert not self.failures, (
            f"{len(self.failures)} of {len(self.failures) + self.completed} streams failed:\n"
            + "\n".join(self.failures[:10])
        )

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._broken = error
            raise

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.streams):
                group.create_task(self._one_after_another(random.Random(number)))

    async def _one_after_another(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            asked = question(rng)
            start = time.monotonic()
            try:
                got = await ask(self.url, self.model, asked)
            except (httpx.HTTPError, ValueError) as error:
                took = time.monotonic() - start
                self.failures.append(f"after {took:.1f} s: {type(error).__name__}: {error}")
                await asyncio.sleep(1)  # a broken service is not asked a thousand times
                continue
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)
            if got == asked.answer:
                self.completed += 1
            else:
                self.failures.append(f"wanted {asked.answer!r}, got {got!r}")


def _words() -> list[str]:
    """Return the words that the demo model knows, from the language that it was trained in."""
    path = ROOT / "runtime" / "demo" / "language.py"
    spec = importlib.util.spec_from_file_location("demo_language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.WORDS)


_WORDS = _words()
