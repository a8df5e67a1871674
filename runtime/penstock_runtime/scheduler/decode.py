"""The decode worker's scheduler: who is admitted, what each step computes, who gives pages back.

A step decodes one token of every running request and, in the time that is left of its budget,
prefills some of the prompts that are computed here. Requests are served in the order of their
arrival. When the KV is full the latest gives its pages back and is computed anew later, so the
oldest always goes on; only requests whose pages a prefill group may write are never preempted.

The engine's cycle:

    plan_admission ──► Remote: grant pages, send Prefill … remote_done or remote_failed
          │        ──► Local, Rejected
      next_batch   ──► compute it ──► complete_step ──► tokens to stream
          └──────────► withdraw_step: it has not begun, and something has happened

Two steps may be out (`steps_out`): while one is computed the next lies ready, so that a device does
not wait for the scheduler nor for what is streamed. The next one's tokens are then those that the
first chooses (`BatchSegment.ahead`). A request that the first ends with a stop token is computed
once more for nothing, and keeps its pages until that has ended. Pages are never taken from a
request that is in a step: where that would be needed, no step is given out until those that are out
have ended.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.scheduler.admission import (
    HERE,
    Admission,
    Local,
    Refused,
    Rejected,
    Remote,
    RemoteSettings,
    choose_prefiller,
)
from penstock_runtime.scheduler.batch import Batch, BatchSegment
from penstock_runtime.scheduler.cost_model import CostModel
from penstock_runtime.scheduler.decode_request import DecodeRequest, State
from penstock_runtime.scheduler.pages import BlocksUnderway, reserve
from penstock_runtime.scheduler.step_sharing import Prompt, share
from penstock_wire.messages import Tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from penstock_runtime.scheduler.pages import Pages
    from penstock_wire.messages import ChunkItem, Sampling, TokenOut


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How the decode worker shares its steps and its pages."""

    max_running: int = 64
    """Requests admitted at once, those being prefilled remotely included."""
    max_waiting: int = 1024
    """Beyond it new requests are refused as overloaded: the router tries elsewhere."""
    max_batch_tokens: int = 2048
    """Of a step: the memory for its activations. Bounds the chunks of a local prefill."""
    prefill_seconds: float = 0.05
    """What prefilling may add to a step that also decodes, so to the time between two tokens.
    One page is always computed, or a slow machine would never finish a prompt."""
    idle_prefill_seconds: float = 1.0
    """Longest step that only prefills: a request that comes in waits for its end."""
    oldest_share: float = 0.5
    """Of the prefilling in a step, to the oldest prompt when shorter ones overtake it."""
    steps_out: int = 1
    """Steps given out at a time. 2: one is computed, and one lies ready for it."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)

    def __post_init__(self) -> None:
        if min(self.max_running, self.max_waiting, self.max_batch_tokens) < 1:
            raise ValueError(f"limits are at least 1: {self}")
        if self.steps_out not in (1, 2):
            # A step takes the token that it lacks from the one before: there is no further back.
            raise ValueError(f"1 or 2 steps can be out, not {self.steps_out}")


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """What waits and runs, for Load."""

    running: int
    waiting: int
    queued_tokens: int
    """Prompt tokens that are to be computed here."""
    queued_seconds: float


class DecodeScheduler:
    """Schedules one decode worker. Pure: the engine tells it what happened, and when.

    Args:
        pool: the worker's pages. Grants and quarantines are made by the engine, see `Remote`.
        max_model_len: longest sequence, prompt and output together, in tokens.
        settings: limits.
        cost: the model of a step, if there is a better one than the default.
    """

    def __init__(
        self,
        pool: Pages,
        max_model_len: int,
        settings: DecodeSettings | None = None,
        cost: CostModel | None = None,
    ) -> None:
        settings = settings or DecodeSettings()
        if settings.max_batch_tokens < settings.max_running + pool.page_size:
            raise ValueError(
                f"max_batch_tokens {settings.max_batch_tokens} must hold a token of each of "
                f"{settings.max_running} requests (max_running) and a page of {pool.page_size}"
            )
        self._pool = pool
        self._page_size = pool.page_size
        # A sequence that fills the whole pool ends there: alone, every request can go on.
        self._max_length = min(max_model_len, pool.total * pool.page_size)
        self._settings = settings
        self.cost = cost or CostModel()
        self._requests: dict[str, DecodeRequest] = {}
        self._waiting: list[DecodeRequest] = []
        """In order."""
        self._admitted: list[DecodeRequest] = []
        """RUNNING and REMOTE ones, in order."""
        self._underway = BlocksUnderway()
        self._out: deque[Batch] = deque()
        self._held_up = False
        """Whether somebody has a right to pages of a request that is in a step."""
        self._next_order = 0
        self.preemptions = 0
        """Since the start, for metrics."""

    # --- requests -----------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: array[int],
        output: array[int],
        sampling: Sampling,
        root: bytes,
        *,
        group: str = "",
        force_group: bool = False,
        now: float = 0.0,
    ) -> Tokens | None:
        """Queue a request. `output`: what earlier attempts on other workers already gave.

        Returns:
            Its end, if that output leaves nothing to be generated; else None.

        Raises:
            Refused: it can never be answered here, its id is taken, or too many wait.
        """
        if request_id in self._requests:
            raise Refused("invalid", f"request {request_id} is here already", retriable=False)
        if not prompt:
            raise Refused("invalid", "the prompt is empty", retriable=False)
        if len(prompt) >= self._max_length:
            raise Refused(
                "too_long",
                f"the prompt has {len(prompt)} tokens; this worker answers prompts of up to "
                f"{self._max_length - 1}",
                retriable=False,
            )
        if len(self._waiting) >= self._settings.max_waiting:
            raise Refused("overloaded", f"{len(self._waiting)} requests wait", retriable=True)
        request = DecodeRequest(
            request_id=request_id,
            tokens=prompt + output,
            prompt_length=len(prompt),
            sampling=sampling,
            root=root,
            group=group,
            force_group=force_group,
            order=self._next_order,
            arrived=now,
        )
        finish = request.finish(self._max_length) if output else ""
        if finish:
            return Tokens(request_id=request_id, position=len(output), tokens=(), finish=finish)
        self._next_order += 1
        self._requests[request_id] = request
        self._waiting.append(request)
        return None

    def get(self, request_id: str) -> DecodeRequest | None:
        """Return a request that is here."""
        return self._requests.get(request_id)

    def cancel(self, request_id: str, delivered: int = 0) -> None:
        """End a request; an unknown one is ignored.

        Args:
            request_id: whose.
            delivered: for a REMOTE one, whose grant was revoked first: as for `remote_failed`.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.state is State.WAITING:
            self._waiting.remove(request)
        elif request.state is State.REMOTE:
            self._leave_remote(request, delivered)
        else:
            self._end(request)
            return
        self._forget(request)

    # --- admission ----------------------------------------------------------------------------

    def plan_admission(self, now: float, groups: Collection[str] = ()) -> list[Admission]:
        """Admit waiting requests in their order, as far as there is room.

        Args:
            now: monotonic seconds.
            groups: names of the prefill groups that can be used.
        """
        admissions: list[Admission] = []
        for request in list(self._waiting):
            if len(self._admitted) >= self._settings.max_running:
                break
            admission = self._consider(request, now, groups)
            if admission == "no room":
                break
            if admission != "later":
                admissions.append(admission)
        return admissions

    def _consider(
        self, request: DecodeRequest, now: float, groups: Collection[str]
    ) -> Admission | Literal["later", "no room"]:
        # The last token is always computed here: its logits choose the next one.
        hashes = request.block_hashes(self._page_size, len(request.tokens) - 1)
        matched = self._pool.match(hashes)
        if self._underway and any(h in self._underway for h in hashes[len(matched) :]):
            return "later"
        cached = len(matched) * self._page_size
        uncached = len(request.tokens) - 1 - cached
        where = choose_prefiller(request, uncached, now, groups, self._settings.remote)
        if where is None:
            return "later"
        if isinstance(where, Rejected):
            self._waiting.remove(request)
            self._forget(request)
            return where
        if not self._make_room(request, matched, remote=where is not HERE):
            return "no room"
        self._announce(request, hashes)
        if where is HERE:
            return Local(request.request_id)
        pages = tuple(request.pages)
        return Remote(request.request_id, where.group, request.tokens[:-1], cached, pages)

    def _make_room(self, request: DecodeRequest, matched: list[int], *, remote: bool) -> bool:
        """Give the request its pages and admit it, or return False."""
        tokens = len(request.tokens) - 1 if remote else len(request.tokens)
        fresh = pages_for(tokens, self._page_size) - len(matched)
        # One page for each that decodes: what is admitted now is not preempted at once.
        spare = len(self._admitted)
        pages = reserve(self._pool, matched, fresh, spare)
        if pages is None and self._can_preempt_for(request, fresh):
            # It is older than some that run, so it has a right to their pages.
            while pages is None and self._preempt_later_than(request):
                pages = reserve(self._pool, matched, fresh)
        if pages is None:
            return False
        self._waiting.remove(request)
        request.pages = pages
        request.computed = len(matched) * self._page_size
        request.committed = len(matched)
        request.state = State.REMOTE if remote else State.RUNNING
        request.group_wait_until = None
        if not request.admissions:
            request.cached_tokens = min(request.computed, request.prompt_length)
        request.admissions += 1
        insort(self._admitted, request, key=_order)
        return True

    def next_deadline(self) -> float | None:
        """Return when `plan_admission` should be asked again even if nothing happens."""
        waits = [r.group_wait_until for r in self._waiting if r.group_wait_until is not None]
        return min(waits, default=None)

    # --- remote prefill -----------------------------------------------------------------------

    def remote_done(self, request_id: str, reused: int) -> None:
        """All KV is there, and all granted pages are resident again: the request decodes.

        Args:
            request_id: a REMOTE one.
            reused: tokens at its start that the group had already, or read from here. What is
                reported as cached is what nobody computed, wherever it lay.
        """
        request = self._remote(request_id)
        if request.admissions == 1:
            reused = min(reused, request.prompt_length)
            request.cached_tokens = max(request.cached_tokens, reused)
        self._commit(request, len(request.tokens) - 1)
        request.remote_failures = 0
        request.state = State.RUNNING

    def remote_failed(self, request_id: str, delivered: int) -> None:
        """The grant was cut short; the request waits again, and resumes from what was delivered.

        Args:
            request_id: a REMOTE one.
            delivered: KV of the tokens [0, delivered), whole pages, lies in pages that are
                resident. Those behind are not the request's any more: the ledger frees them.
        """
        request = self._remote(request_id)
        self._leave_remote(request, delivered)
        request.remote_failures += 1
        request.state = State.WAITING
        insort(self._waiting, request, key=_order)

    def _remote(self, request_id: str) -> DecodeRequest:
        request = self._requests[request_id]
        if request.state is not State.REMOTE:
            raise ValueError(f"request {request_id} is {request.state.value}, not remote")
        return request

    def _leave_remote(self, request: DecodeRequest, delivered: int) -> None:
        self._commit(request, delivered)
        del request.pages[request.computed // self._page_size :]
        self._leave(request)

    # --- steps --------------------------------------------------------------------------------

    @property
    def room_for_step(self) -> bool:
        """Whether `next_batch` can be asked."""
        return len(self._out) < self._settings.steps_out

    def next_batch(self) -> Batch | None:
        """Return the next step, or None if there is nothing to compute, or nothing yet.

        Up to `steps_out` are out at a time. They are given back in their order: the first by
        `complete_step`, the last by `withdraw_step`, all of them by `abort_steps`.
        """
        if not self.room_for_step:
            raise RuntimeError(f"{len(self._out)} batches have not been completed")
        decoding = [] if self._held_up else [r for r in self._running() if self._decodes(r)]
        if self._held_up:
            return None
        segments = [self._segment(r, 1) for r in decoding]
        prefilling = {r.order: r for r in self._running() if r.unissued > 1}
        segments += [
            self._segment(prefilling[item.key], item.length)
            for item in self._share_prefill(prefilling, len(segments))
        ]
        if not segments:
            return None
        batch = Batch(tuple(segments))
        self._out.append(batch)
        return batch

    def _running(self) -> list[DecodeRequest]:
        return [r for r in self._admitted if r.state is State.RUNNING]

    def _decodes(self, request: DecodeRequest) -> bool:
        """Tell whether a request decodes in this step; find it a page for that."""
        # The oldest are asked first: one that was preempted for them is not RUNNING any more.
        if request.state is not State.RUNNING or request.unissued > 1:
            return False
        if request.ends_in_steps_out(self._max_length):
            return False
        if len(request.pages) * self._page_size >= request.length:
            return True
        while not self._pool.available():
            if not self._preempt_later_than(request):
                # The pages are with older requests or prefill groups: sit this step out.
                return False
        request.pages += self._pool.allocate(1)
        return True

    def _share_prefill(
        self, prefilling: dict[int, DecodeRequest], decoding: int
    ) -> list[ChunkItem]:
        settings = self._settings
        prompts = [Prompt(r.order, r.issued, r.issued, len(r.tokens)) for r in prefilling.values()]
        return share(
            self.cost.cost,
            prompts,
            self._page_size,
            settings.prefill_seconds if decoding else settings.idle_prefill_seconds,
            settings.max_batch_tokens - decoding,
            settings.oldest_share,
        )

    def _segment(self, request: DecodeRequest, length: int) -> BatchSegment:
        start, end = request.issued, request.issued + length
        ahead = end > len(request.tokens)
        segment = BatchSegment(
            request_id=request.request_id,
            start=start,
            tokens=array("i", [0]) if ahead else request.tokens[start:end],
            pages=tuple(request.pages[: pages_for(end, self._page_size)]),
            sample=end == request.length,
            position=request.length - request.prompt_length,
            ahead=ahead,
        )
        request.steps_out += 1
        request.tokens_out += length
        request.samples_out += segment.sample
        return segment

    def complete_step(self, batch: Batch, sampled: Sequence[TokenOut]) -> list[Tokens]:
        """A batch was computed. Returns what to stream, one message a request that got a token.

        Args:
            batch: of `next_batch`, the first that is out.
            sampled: the chosen token of each of `batch.sampled`, in order.

        Raises:
            ValueError: another batch is out, or the tokens are not as many.
        """
        if len(sampled) != len(batch.sampled):
            raise ValueError(f"{len(sampled)} tokens for {len(batch.sampled)} segments")
        self._take_back(batch, index=0)
        tokens = iter(sampled)
        messages: list[Tokens] = []
        for segment in batch.segments:
            request = self._returned(segment)
            token = next(tokens) if segment.sample else None
            if request.state is State.FINISHED:
                self._end(request)
                continue
            self._commit(request, segment.start + segment.length)
            if token is not None:
                messages.append(self._append(request, token))
        return messages

    def withdraw_step(self, batch: Batch) -> None:
        """The last batch that is out will not be computed: what it was for is planned anew.

        Raises:
            ValueError: another batch is the last.
        """
        self._take_back(batch, index=-1)
        for segment in batch.segments:
            request = self._returned(segment)
            if request.state is State.FINISHED:
                self._end(request)

    def abort_steps(self) -> list[str]:
        """No batch that is out could be computed: their requests end, and nothing of them is kept.

        Returns the ids of those that had not finished.
        """
        failed: list[str] = []
        while self._out:
            batch = self._out[0]
            self._take_back(batch, index=0)
            for segment in batch.segments:
                request = self._returned(segment)
                if request.state is not State.FINISHED:
                    failed.append(request.request_id)
                self._end(request)
        return failed

    def _take_back(self, batch: Batch, *, index: int) -> None:
        if not self._out or batch is not self._out[index]:
            raise ValueError("this is not the batch that is out")
        del self._out[index]
        if not self._out:
            self._held_up = False

    def _returned(self, segment: BatchSegment) -> DecodeRequest:
        """Return the request of a segment that is not out any more."""
        request = self._requests[segment.request_id]
        request.steps_out -= 1
        request.tokens_out -= segment.length
        request.samples_out -= segment.sample
        return request

    def _append(self, request: DecodeRequest, token: TokenOut) -> Tokens:
        request.tokens.append(token.id)
        finish = request.finish(self._max_length)
        if finish:
            self._end(request)
        return Tokens(
            request_id=request.request_id,
            position=request.output_length - 1,
            tokens=(token,),
            finish=finish,
            cached_tokens=request.cached_tokens,
        )

    # --- pages --------------------------------------------------------------------------------

    def _commit(self, request: DecodeRequest, computed: int) -> None:
        """KV of [0, computed) is there: its full blocks can be found from now on."""
        request.computed = max(request.computed, computed)
        hashes = request.block_hashes(self._page_size, request.computed)
        for i in range(request.committed, len(hashes)):
            parent = hashes[i - 1] if i else request.root
            self._pool.commit(request.pages[i], hashes[i], parent)
        request.committed = max(request.committed, len(hashes))
        self._withdraw(request, request.committed)

    def _announce(self, request: DecodeRequest, hashes: list[bytes]) -> None:
        """Let others that need these blocks wait for them rather than compute them again.

        Blocks that are computed here come one by one. Those of a prefill group come all at the end,
        so only who needs the very last one has no other way that is faster.
        """
        first = request.committed
        if request.state is State.REMOTE:
            first = max(first, len(hashes) - 1)
        request.underway = {i: hashes[i] for i in range(first, len(hashes))}
        self._underway.add(request.underway.values())

    def _withdraw(self, request: DecodeRequest, blocks: int) -> None:
        """The first `blocks` blocks are not underway any more."""
        done = [i for i in request.underway if i < blocks]
        self._underway.remove(request.underway.pop(i) for i in done)

    def _can_preempt_for(self, request: DecodeRequest, fresh: int) -> bool:
        pages = sum(len(r.pages) for r in self._admitted if _yields(r, request))
        return self._pool.available() + pages >= fresh

    def _preempt_later_than(self, request: DecodeRequest) -> bool:
        """Take the pages of the latest request behind this one; tell whether there was one."""
        victim = next((r for r in reversed(self._admitted) if _yields(r, request)), None)
        if victim is None:
            return False
        if victim.steps_out:
            self._held_up = True
            return False
        self._leave(victim)
        victim.state = State.WAITING
        insort(self._waiting, victim, key=_order)
        self.preemptions += 1
        return True

    def _end(self, request: DecodeRequest) -> None:
        """An admitted request has finished; its pages are its own until no step uses them."""
        request.state = State.FINISHED
        if not request.steps_out:
            self._leave(request)
            self._forget(request)

    def _leave(self, request: DecodeRequest) -> None:
        """An admitted request gives up its pages; what has a block stays in the cache."""
        self._pool.release(request.pages)
        self._admitted.remove(request)
        self._withdraw(request, len(request.tokens))
        request.pages = []
        request.computed = request.committed = 0

    def _forget(self, request: DecodeRequest) -> None:
        request.state = State.FINISHED
        del self._requests[request.request_id]

    # --- what others want to know -------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not self._requests

    def load(self) -> DecodeLoad:
        """Return what waits and runs."""
        cost = self.cost.cost
        here = [(r.issued, len(r.tokens)) for r in self._running() if r.unissued > 1]
        here += [(0, len(r.tokens)) for r in self._waiting if not r.group]
        return DecodeLoad(
            running=len(self._admitted),
            waiting=len(self._waiting),
            queued_tokens=sum(end - start for start, end in here),
            queued_seconds=sum(cost.work(start, end) for start, end in here),
        )


def _yields(other: DecodeRequest, request: DecodeRequest) -> bool:
    return other.order > request.order and other.state is State.RUNNING


def _order(request: DecodeRequest) -> int:
    return request.order
