"""Stage 0's scheduler: the only place of a prefill group where anything is decided.

A request's way through it:

    waiting ──admitted──► active ──last chunk planned, or ended early──► ending ──► gone
                            pages held, chunks planned                   pages held until every
                                                                         stage said Released

Each call of `next_plan` admits what it can and fills one step, see `step_sharing`.

Which blocks are in the prefix cache: a block is committed when *every* stage said StepDone for the
step that completed it (or, for pages loaded from the receiver, for the request's first step, which
waits for the load). Plans run in order, so a request that matches a block which is only planned
would find it computed too; but then a fault would have to hunt down all that was built upon it,
and a broken epoch would leave blocks that some stage never computed. A stage reports a StageFault
before the StepDone of the step concerned, on the same link, so with this rule neither can happen.
What it would cost, the same prefix computed by each of a burst, `BlocksUnderway` avoids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock_runtime.kvcache.base import pages_for
from penstock_runtime.scheduler.chunk_planner import ChunkPlanner, taper
from penstock_runtime.scheduler.cost_model import Chunk, CostModel
from penstock_runtime.scheduler.pages import BlocksUnderway, reserve
from penstock_runtime.scheduler.step_sharing import Prompt, best_seconds, share
from penstock_wire.blocks import block_hashes
from penstock_wire.messages import Admit, StepPlan, pack_tokens

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from penstock_runtime.scheduler.cost_model import Cost
    from penstock_runtime.scheduler.pages import Pages
    from penstock_wire.messages import ChunkItem, CostCoefficients, StepDone


class PromptRefused(Exception):  # noqa: N818 - it names the event
    """The request can never be computed here. The message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSettings:
    """What stage 0 may do at once."""

    max_active: int = 64
    """Requests in the pipeline. Memory limits them earlier; this bounds a plan's size."""
    oldest_share: float = 0.5
    """Of a step's time, to the oldest request when shorter ones overtake it: a very long prompt
    is slowed by at most this factor, and a short one sees at least the rest."""
    depth: int = 2
    """Steps a stage that have been given and not done: one that runs and one that is ready. Each
    more makes a new prompt wait for another step, and takes memory for activations."""
    bypass_seconds: float = 5.0
    """How long smaller requests may overtake one for which there are not enough pages; then it is
    given the pages that come free before anyone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillRequest:
    """KV of `tokens` is wanted in the receiver's `target_pages`.

    Of these, the first `cached` tokens are there already. `root` is the parent of the first block.
    """

    grant: int
    receiver: str
    incarnation: int
    tokens: array[int]
    cached: int
    target_pages: tuple[int, ...]
    root: bytes


@dataclass(frozen=True, slots=True)
class GrantFailed:
    """To be told to the receiver as PrefillFailed."""

    receiver: str
    incarnation: int
    grant: int
    message: str


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """What waits and runs, for Load."""

    running: int
    waiting: int
    queued_tokens: int
    """Not yet planned."""
    queued_seconds: float
    """That the slowest stage will take for them."""


@dataclass(eq=False, slots=True)
class _Waiting:
    request: PrefillRequest
    hashes: list[bytes]
    """Of every full block of the prompt."""
    arrived: float


@dataclass(eq=False, slots=True)
class _Active:
    request: PrefillRequest
    hashes: list[bytes]
    key: int
    pages: list[int]
    start: int
    """First token that is computed."""
    planned: int
    """Tokens [start, planned) are in plans."""
    committed: int
    """Blocks [0, committed) are in the prefix cache."""
    stages: set[int]
    """That have not said Released."""
    valid: bool = True
    """Cleared by a fault or a revocation: none of its blocks may enter the cache any more."""
    release_planned: bool = False

    @property
    def end(self) -> int:
        return len(self.request.tokens)


@dataclass(eq=False, slots=True)
class _Step:
    items: tuple[ChunkItem, ...]
    stages: set[int]
    """That have not said StepDone."""


class PrefillScheduler:
    """Plans the steps of one prefill group. Pure: the engine tells it what happened, and when.

    Args:
        stages: P.
        pool: the group's pages; `total` is the smallest stage's.
        planner: for the time of a step.
        settings: limits.
        costs: a cost model a stage, if there are better ones than the default.
    """

    def __init__(
        self,
        stages: int,
        pool: Pages,
        planner: ChunkPlanner | None = None,
        settings: PrefillSettings | None = None,
        costs: Sequence[CostModel] | None = None,
    ) -> None:
        self._stages = stages
        self._pool = pool
        self._planner = planner or ChunkPlanner(stages, pool.page_size)
        self._settings = settings or PrefillSettings()
        self._costs = list(costs) if costs else [CostModel() for _ in range(stages)]
        self._page_size = pool.page_size
        self._waiting: list[_Waiting] = []
        self._active: dict[int, _Active] = {}
        """By key, in order of arrival: those with tokens left to plan."""
        self._ending: dict[int, _Active] = {}
        self._underway = BlocksUnderway()
        self._steps: dict[int, _Step] = {}
        self._given = 0
        """Of these, those that stage 0 has not done."""
        self._queued: tuple[int, int] | None = None
        """Sums over what waits, see `_queued_work`; None after a change of it."""
        self._epoch = 0
        self._next_step = 0
        self._next_key = 0

    # --- requests -----------------------------------------------------------------------------

    def add(self, request: PrefillRequest, now: float) -> None:
        """Queue a request. Raises PromptRefused if it can never be computed here."""
        length = len(request.tokens)
        pages = pages_for(length, self._page_size)
        if not 0 <= request.cached <= length:
            raise PromptRefused(f"{request.cached} of {length} tokens are said to be cached")
        if len(request.target_pages) < pages:
            raise PromptRefused(
                f"{length} tokens need {pages} pages of {self._page_size}, "
                f"{len(request.target_pages)} were granted"
            )
        if pages > self._pool.total:
            raise PromptRefused(
                f"the prompt needs {pages} pages and this group has {self._pool.total}: "
                "give its stages more KV memory, or lower the model's maximum length"
            )
        hashes = block_hashes(request.root, pack_tokens(request.tokens), self._page_size)
        self._waiting.append(_Waiting(request, hashes, now))
        self._queued = None

    def revoke(self, receiver: str, grant: int) -> bool:
        """End a request that its receiver does not want any more; tell whether it was here."""
        return bool(self._drop(lambda r: r.receiver == receiver and r.grant == grant))

    def drop_receiver(self, receiver: str, before: int | None = None) -> list[int]:
        """End a lost receiver's requests, or only those of incarnations before `before`.

        Returns their grants.
        """
        return self._drop(
            lambda r: r.receiver == receiver and (before is None or r.incarnation < before)
        )

    def prompt(self, key: int, start: int, length: int) -> array[int]:
        """Return tokens [start, start + length) of a request in the pipeline.

        Raises KeyError if the key has been released.
        """
        active = self._active.get(key) or self._ending[key]
        return active.request.tokens[start : start + length]

    # --- plans --------------------------------------------------------------------------------

    def next_plan(self, now: float, *, may_compute: bool = True) -> StepPlan | None:
        """Return the next plan, or None if there is nothing to say yet.

        Args:
            now: monotonic seconds.
            may_compute: False while the ring takes no more steps.
        """
        admits: list[Admit] = []
        items: tuple[ChunkItem, ...] = ()
        if may_compute and self._has_room():
            admits = list(self._admit(now))
            items = self._fill_step()
        elif self._active:
            # Releases can wait for the step that will soon be possible.
            return None
        for active in [a for a in self._active.values() if a.planned == a.end]:
            self._end(active)
        releases = self._plan_releases()
        if not (admits or items or releases):
            return None
        plan = StepPlan(
            step=self._next_step,
            epoch=self._epoch,
            items=items,
            admit=tuple(admits),
            release=releases,
        )
        if items:
            self._steps[plan.step] = _Step(items, set(range(self._stages)))
            self._given += 1
        self._next_step += 1
        return plan

    def _has_room(self) -> bool:
        """Tell whether neither stage 0 nor the pipeline as a whole has steps enough."""
        depth = self._settings.depth
        return self._given < depth and len(self._steps) < depth * self._stages

    def _admit(self, now: float) -> Iterator[Admit]:
        for waiting in list(self._waiting):
            if len(self._active) >= self._settings.max_active:
                return
            matched = self._pool.match(waiting.hashes)
            if self._sibling_underway(waiting, len(matched)):
                continue
            admit = self._try_admit(waiting, matched)
            if admit is not None:
                self._waiting.remove(waiting)
                self._queued = None
                yield admit
            elif now - waiting.arrived >= self._settings.bypass_seconds:
                return

    def _sibling_underway(self, waiting: _Waiting, own: int) -> bool:
        known = max(own, waiting.request.cached // self._page_size)
        return known < len(waiting.hashes) and waiting.hashes[known] in self._underway

    def _try_admit(self, waiting: _Waiting, matched: list[int]) -> Admit | None:
        request, hashes = waiting.request, waiting.hashes
        length = len(request.tokens)
        pages = reserve(self._pool, matched, pages_for(length, self._page_size) - len(matched))
        if pages is None:
            return None
        own, theirs = len(matched), request.cached // self._page_size
        start = min(length, max(own, theirs) * self._page_size)
        if request.cached == length:
            start = length
        active = _Active(
            request=request,
            hashes=hashes,
            key=self._next_key,
            pages=pages,
            start=start,
            planned=start,
            committed=own,
            stages=set(range(self._stages)),
        )
        self._next_key += 1
        self._active[active.key] = active
        self._underway.add(hashes[own:])
        return Admit(
            key=active.key,
            grant=request.grant,
            receiver=request.receiver,
            incarnation=request.incarnation,
            pages=tuple(pages),
            target_pages=request.target_pages[: len(pages)],
            # Nothing is computed behind a prompt that the receiver has in full.
            load=(own, theirs) if own < theirs and start < length else (0, 0),
            send_from=pages_for(length, self._page_size) if request.cached == length else theirs,
            start=start,
            length=length,
        )

    def _fill_step(self) -> tuple[ChunkItem, ...]:
        cost = self._costs[self._slowest()].cost
        prompts = [
            Prompt(a.key, a.start, a.planned, a.end)
            for a in self._active.values()
            if a.planned < a.end
        ]
        if not prompts:
            return ()
        items = share(
            cost,
            prompts,
            self._page_size,
            best_seconds(self._planner, cost, prompts, self._queued_work(cost), self._taper()),
            self._planner.step_tokens,
            self._settings.oldest_share,
        )
        for item in items:
            self._active[item.key].planned += item.length
        return tuple(items)

    def _queued_work(self, cost: Cost) -> float:
        """Return the seconds of work that waits: `cost.work` of it all, from two sums.

        Thousands may wait, and every step asks.
        """
        if self._queued is None:
            ranges = [(w.request.cached, len(w.request.tokens)) for w in self._waiting]
            self._queued = (
                sum(end - start for start, end in ranges),
                sum(end * end - start * start for start, end in ranges),
            )
        tokens, pairs = self._queued
        return cost.b * tokens + cost.a * pairs

    def _plan_releases(self) -> tuple[int, ...]:
        keys = [a.key for a in self._ending.values() if not a.release_planned]
        for key in keys:
            self._ending[key].release_planned = True
        return tuple(keys)

    def _slowest(self) -> int:
        """Return the stage that takes longest for what is typical now."""
        lengths = [a.end for a in self._active.values()] or [self._planner.step_tokens]
        probe = [Chunk(sum(lengths) // len(lengths) // 2, self._planner.step_tokens)]
        times = [model.cost.step(probe) for model in self._costs]
        return times.index(max(times))

    def _taper(self) -> float:
        """Return by how much steps may shrink: what counts is how prompts end."""
        end, step = max(a.end for a in self._active.values()), self._planner.step_tokens
        last = [Chunk(max(0, end - step), min(end, step))]
        return taper([model.cost.step(last) for model in self._costs])

    # --- what the stages say ------------------------------------------------------------------

    def step_done(self, done: StepDone) -> None:
        """A stage has computed a step: learn its cost, and commit what all stages have now."""
        step = self._steps.get(done.step)
        if done.epoch != self._epoch or step is None or done.stage not in step.stages:
            return
        step.stages.remove(done.stage)
        self._given -= done.stage == 0
        chunks = [Chunk(item.start, item.length) for item in step.items]
        self._costs[done.stage].observe(chunks, done.compute_seconds)
        if step.stages:
            return
        del self._steps[done.step]
        for item in step.items:
            active = self._active.get(item.key) or self._ending.get(item.key)
            if active is not None and active.valid:
                self._commit(active, item.start + item.length)

    def _commit(self, active: _Active, computed: int) -> None:
        blocks = computed // self._page_size
        for i in range(active.committed, blocks):
            parent = active.hashes[i - 1] if i else active.request.root
            self._pool.commit(active.pages[i], active.hashes[i], parent)
        self._underway.remove(active.hashes[active.committed : blocks])
        active.committed = max(active.committed, blocks)

    def released(self, epoch: int, stage: int, keys: Iterable[int]) -> None:
        """A stage touches the pages of these keys no more; after all stages they are reused."""
        if epoch != self._epoch:
            return
        for key in keys:
            active = self._ending.get(key)
            if active is None or not active.release_planned:
                continue
            active.stages.discard(stage)
            if not active.stages:
                del self._ending[key]
                self._invalidate(active)
                self._pool.release(active.pages)

    def fault(self, epoch: int, key: int, message: str) -> GrantFailed | None:
        """A request cannot go on. Returns what its receiver is to be told, if it is to be."""
        active = self._active.get(key) or self._ending.get(key)
        if epoch != self._epoch or active is None or not active.valid:
            return None
        self._invalidate(active)
        return _failed(active, message)

    def new_epoch(self, epoch: int, message: str, pool: Pages | None = None) -> list[GrantFailed]:
        """The pipeline was re-formed. Call it when every stage has ended the old epoch.

        Requests in the pipeline fail, those that wait go on waiting, and none of the old epoch's
        pages is touched by a stage any more.

        Args:
            epoch: plans carry it from now on.
            message: why, for those that fail.
            pool: a new one, if a stage lost its cache or the smallest pool changed; what waits
                and does not fit into it fails too.
        """
        dropped = [*self._active.values(), *self._ending.values()]
        failed = [_failed(active, message) for active in dropped if active.valid]
        for active in dropped:
            self._pool.release(active.pages)
        self._active.clear()
        self._ending.clear()
        self._steps.clear()
        self._given = 0
        self._underway = BlocksUnderway()
        self._epoch = epoch
        if pool is not None:
            failed += self._replace_pool(pool)
        return failed

    def _replace_pool(self, pool: Pages) -> list[GrantFailed]:
        if pool.page_size != self._page_size:
            raise ValueError(f"a pool of pages of {pool.page_size} replaces {self._page_size}")
        self._pool = pool
        waiting, self._waiting = self._waiting, []
        self._queued = None
        failed: list[GrantFailed] = []
        for item in waiting:
            request = item.request
            if pages_for(len(request.tokens), self._page_size) <= pool.total:
                self._waiting.append(item)
            else:
                reason = f"the prompt does not fit into {pool.total} pages"
                failed.append(
                    GrantFailed(request.receiver, request.incarnation, request.grant, reason)
                )
        return failed

    # --- ends ---------------------------------------------------------------------------------

    def _drop(self, unwanted: Callable[[PrefillRequest], bool]) -> list[int]:
        grants = [w.request.grant for w in self._waiting if unwanted(w.request)]
        self._waiting = [w for w in self._waiting if not unwanted(w.request)]
        self._queued = None
        for active in [*self._active.values(), *self._ending.values()]:
            if active.valid and unwanted(active.request):
                grants.append(active.request.grant)
                self._invalidate(active)
        return grants

    def _invalidate(self, active: _Active) -> None:
        """None of its blocks enters the cache any more; the next plan releases it."""
        if active.valid:
            active.valid = False
            self._underway.remove(active.hashes[active.committed :])
        self._end(active)

    def _end(self, active: _Active) -> None:
        if self._active.pop(active.key, None) is not None:
            self._ending[active.key] = active

    # --- what others want to know -------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs, or is still to be released."""
        return not (self._waiting or self._active or self._ending)

    def load(self) -> PrefillLoad:
        """Return what waits and runs."""
        cost = self._costs[self._slowest()].cost
        chunks = [(a.planned, a.end) for a in self._active.values()]
        queued_seconds = self._queued_work(cost)
        assert self._queued is not None
        return PrefillLoad(
            running=len(self._active),
            waiting=len(self._waiting),
            queued_tokens=self._queued[0] + sum(end - start for start, end in chunks),
            queued_seconds=queued_seconds + sum(cost.work(start, end) for start, end in chunks),
        )

    def cost(self) -> CostCoefficients:
        """Return the slowest stage's cost model, for Load."""
        return self._costs[self._slowest()].export()

    def stage_costs(self) -> list[CostCoefficients]:
        """Return every stage's cost model, for metrics."""
        return [model.export() for model in self._costs]


def _failed(active: _Active, message: str) -> GrantFailed:
    request = active.request
    return GrantFailed(request.receiver, request.incarnation, request.grant, message)
