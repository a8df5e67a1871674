"""The life of a request across attempts: exactly one stream of tokens, whatever workers do.

A worker that is lost, drains, or fails in a way that another attempt may mend costs the client
nothing but time: the request goes to another worker together with the tokens that the client has
already, and `Tokens.position` says where the continuation belongs, so no token comes twice and none
is left out. Each attempt has its own request id, so that a late answer of an old one is dropped.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from penstock_router.calls import Call, Lost
from penstock_router.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    NoWorker,
    Overloaded,
    Stalled,
)
from penstock_router.policy import Choice, Demand
from penstock_router.workers import Prompt
from penstock_wire.messages import Failed, Generate, Sampling, TokenOut, pack_tokens
from penstock_wire.sockets import LinkDown

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from penstock_router.calls import Answer
    from penstock_router.metrics import Metrics
    from penstock_router.wake import Waker
    from penstock_router.workers import Fleet, Worker

log = logging.getLogger(__name__)

_FIRST_BACKOFF = 0.05
"""Seconds that a worker is left alone after its first failure; doubles with every attempt."""
_LONGEST_BACKOFF = 2.0
_ASK_AGAIN_SECONDS = 5.0
"""Between two asks of a held request that a role be woken: it may be put back to sleep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One completion to generate."""

    request_id: str
    tokens: bytes
    """The prompt, packed."""
    sampling: Sampling
    salt: bytes = b""
    arrived: float = field(default_factory=time.monotonic)
    """When the client's request came in, on the monotonic clock; TTFT counts from here."""


@dataclass(frozen=True, slots=True)
class Update:
    """New output tokens, in order and without gap or overlap."""

    tokens: tuple[TokenOut, ...]
    finish: Literal["", "stop", "length"]
    cached_tokens: int
    """Prompt tokens that the first attempt found in a cache."""


class _Retry(Exception):  # noqa: N818 - it steers, it is not an error
    """This attempt is over; another may do better."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class _Run:
    """A job's state across its attempts."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.output = array("i")
        self.finish: Literal["", "stop", "length"] = ""
        self.attempts = 0
        self.cached_tokens = 0
        self.avoid: dict[str, float] = {}
        self.last_failure: _Retry | None = None
        self._first_answer = True

    def prompt(self) -> Prompt:
        """Return what has to be in the KV cache: the prompt and the tokens so far."""
        return Prompt(self.job.tokens + pack_tokens(self.output), self.job.salt)

    def demand(self) -> Demand:
        """Return what is still asked for."""
        return Demand(
            prompt_tokens=len(self.job.tokens) // 4 + len(self.output),
            max_output=max(1, self.job.sampling.max_tokens - len(self.output)),
        )

    def generate(self, choice: Choice) -> Generate:
        """Return the message that starts the next attempt."""
        self.attempts += 1
        return Generate(
            request_id=f"{self.job.request_id}.{self.attempts}",
            tokens=self.job.tokens,
            output=pack_tokens(self.output),
            sampling=self.job.sampling,
            group=choice.group,
            salt=self.job.salt,
        )

    def take(self, answer: Answer) -> Update | None:
        """Return what is new in `answer`; None if nothing is.

        Raises:
            _Retry: the attempt is over.
            ApiError: the request is over.
        """
        if isinstance(answer, Lost):
            raise _Retry("lost", answer.reason)
        if isinstance(answer, Failed):
            raise _failure(answer)
        overlap = len(self.output) - answer.position
        if overlap < 0:
            raise _Retry("gap", f"tokens at {answer.position} after {len(self.output)}")
        fresh = answer.tokens[overlap:] if overlap else answer.tokens
        self.output.extend([token.id for token in fresh])
        self.finish = answer.finish
        if self._first_answer:
            self._first_answer = False
            self.cached_tokens = answer.cached_tokens
        if not fresh and not answer.finish:
            return None
        return Update(fresh, answer.finish, self.cached_tokens)

    def ended(self) -> Update | None:
        """Return the end of an output that is whole, whose worker was lost before it said so."""
        sampling = self.job.sampling
        if not self.output:
            return None
        if len(self.output) >= sampling.min_tokens and self.output[-1] in sampling.stop_token_ids:
            self.finish = "stop"
        elif len(self.output) >= sampling.max_tokens:
            self.finish = "length"
        return Update((), self.finish, self.cached_tokens) if self.finish else None

    def backoff(self, worker: str, failure: _Retry) -> None:
        """Leave `worker` alone for a while."""
        pause = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** (self.attempts - 1))
        self.avoid[worker] = time.monotonic() + pause
        self.last_failure = failure

    def avoided(self) -> dict[str, float]:
        """Return the workers to leave alone now, with the time when that ends."""
        now = time.monotonic()
        self.avoid = {name: until for name, until in self.avoid.items() if until > now}
        return self.avoid


class Proxy:
    """Generates completions on the fleet.

    Args:
        fleet: the workers.
        waker: wakes roles that are scaled to zero.
        metrics: what happens is counted there.
        max_queue: completions that may wait for their first token.
        max_attempts: workers tried for one completion.
        worker_wait: seconds to wait for any worker to be there.
        stall: seconds that a worker may give no token.
    """

    def __init__(
        self,
        fleet: Fleet,
        waker: Waker,
        metrics: Metrics,
        *,
        max_queue: int,
        max_attempts: int,
        worker_wait: float,
        stall: float,
    ) -> None:
        self._fleet = fleet
        self._waker = waker
        self._metrics = metrics
        self._max_queue = max_queue
        self._max_attempts = max_attempts
        self._worker_wait = worker_wait
        self._stall = stall
        self.waiting = 0
        """Completions without a first token."""
        self.running = 0
        """Completions with one."""
        self._idle_since = time.monotonic()

    def idle_seconds(self) -> float:
        """Return for how long no completion has been in flight; 0 while one is."""
        busy = self.waiting or self.running
        return 0.0 if busy else time.monotonic() - self._idle_since

    def check_queue(self) -> None:
        """Raise Overloaded if one more completion may not wait."""
        if self.waiting >= self._max_queue:
            raise Overloaded(
                f"{self.waiting} completions wait for their first token, the limit is "
                f"{self._max_queue}; try again later",
                code="queue_full",
                retry_after=self._retry_after(),
            )

    async def generate(self, job: Job) -> AsyncGenerator[Update]:
        """Yield the output of `job` as it comes, the last update with a finish reason.

        Close the generator (`contextlib.aclosing`) to cancel the request at its worker.

        Raises:
            ApiError: the request is over without an answer.
        """
        self.check_queue()
        self.waiting += 1
        previous = job.arrived
        first = True
        try:
            async with aclosing(self._attempts(_Run(job))) as updates:
                async for update in updates:
                    now = time.monotonic()
                    if first:
                        self.waiting -= 1
                        self.running += 1
                        self._metrics.ttft.observe(now - previous)
                        first = False
                    elif update.tokens:
                        self._metrics.itl.observe((now - previous) / len(update.tokens))
                    previous = now
                    yield update
        finally:
            if first:
                self.waiting -= 1
            else:
                self.running -= 1
            self._idle_since = time.monotonic()

    async def _attempts(self, run: _Run) -> AsyncGenerator[Update]:
        while not run.finish:
            worker, call = await self._place(run)
            try:
                while not run.finish:
                    update = run.take(await self._next(call, worker))
                    if update is not None:
                        yield update
            except _Retry as failure:
                log.info("request %s: %s on %s", run.job.request_id, failure, worker.name)
                run.backoff(worker.name, failure)
                self._metrics.retries.labels(failure.code).inc()
            finally:
                call.close()
                self._fleet.release(worker)
            if not run.finish:
                end = run.ended()
                if end is not None:
                    yield end
                    return
                self._check_attempts(run)

    async def _next(self, call: Call, worker: Worker) -> Answer:
        try:
            return await call.get(self._stall)
        except TimeoutError:
            raise Stalled(
                f"worker {worker.name} gave no token for {self._stall:g} s", code="stalled"
            ) from None

    async def _place(self, run: _Run) -> tuple[Worker, Call]:
        """Send the request to the cheapest worker, waiting for one if there is none.

        The wait is longer while a role that was scaled to zero wakes.

        Raises:
            NoWorker, Overloaded: none could take it within the wait.
        """
        prompt, demand = run.prompt(), run.demand()
        started = time.monotonic()
        patience = self._worker_wait
        while True:
            self._waker.request()
            avoid = run.avoided()
            choice = self._fleet.choose(prompt, demand, avoid=avoid)
            if choice is not None:
                try:
                    worker = self._fleet.worker(choice.decode)
                    call = worker.calls.begin(run.generate(choice))
                except LinkDown as error:
                    run.backoff(choice.decode, _Retry("lost", str(error)))
                    self._check_attempts(run)
                    continue
                self._metrics.routed(choice, demand)
                return worker, call
            if self._waker.holds():
                patience = max(patience, self._waker.seconds)
            now = time.monotonic()
            if now >= started + patience:
                raise self._nobody(run)
            alone = self._fleet.alone_at()
            waits = [started + patience, *avoid.values()]
            waits += [alone] if alone and alone > now else []
            waits += [now + _ASK_AGAIN_SECONDS] if self._waker.sleeps else []
            await self._fleet.changed(min(waits) - now)

    def _check_attempts(self, run: _Run) -> None:
        if run.attempts >= self._max_attempts:
            raise self._nobody(run)

    def _nobody(self, run: _Run) -> ApiError:
        failure = run.last_failure
        if failure is not None and failure.code == "overloaded":
            return Overloaded(
                "all workers are overloaded; try again later",
                code="overloaded",
                retry_after=self._retry_after(),
            )
        waited = time.monotonic() - run.job.arrived
        why = f" (last failure: {failure})" if failure is not None else ""
        return NoWorker(
            f"no decode worker could take the request within {waited:.0f} s and "
            f"{run.attempts} attempts{why}; /ready says what is missing",
            code="no_worker",
            retry_after=5,
        )

    def _retry_after(self) -> int:
        return max(1, min(30, math.ceil(self._fleet.queued_seconds())))


def _failure(failed: Failed) -> Exception:
    if failed.retriable:
        return _Retry(failed.code, failed.message)
    if failed.code == "too_long":
        return InvalidRequest(failed.message, code="context_length_exceeded")
    if failed.code == "invalid":
        return InvalidRequest(failed.message, code="invalid_value")
    if failed.code == "overloaded":
        return Overloaded(failed.message, code="overloaded", retry_after=1)
    return InternalError(f"a worker failed: {failed.message}", code=failed.code)
