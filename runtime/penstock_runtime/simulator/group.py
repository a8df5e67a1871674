"""A prefill group on a virtual clock: a scheduler, and a pipeline that carries out its plans.

The scheduler is the one that runs in production, `scheduler.prefill.PrefillScheduler`; it hears of
StepDone and Released as late as it would from real stages, and is asked for plans when it would be.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Protocol

from penstock_runtime.scheduler.chunk_planner import ChunkPlanner
from penstock_runtime.scheduler.cost_model import Cost, CostModel
from penstock_runtime.scheduler.prefill import PrefillRequest, PrefillScheduler
from penstock_runtime.simulator.pipeline import Pipeline, spans
from penstock_wire.messages import StepDone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from penstock_runtime.engine.timeline import StepSpan
    from penstock_runtime.kvcache.pool import PagePool
    from penstock_runtime.scheduler.chunk_planner import ChunkSettings
    from penstock_runtime.scheduler.cost_model import Chunk
    from penstock_runtime.scheduler.prefill import PrefillSettings
    from penstock_runtime.simulator.clock import Clock
    from penstock_runtime.simulator.hardware import Hardware
    from penstock_wire.messages import StepPlan


class Scheduler(Protocol):
    """What a group needs of its scheduler; `PrefillScheduler` has it."""

    def add(self, request: PrefillRequest, now: float) -> None:
        """Queue a request."""

    def next_plan(self, now: float) -> StepPlan | None:
        """Return the next plan, if there is anything to say."""

    def step_done(self, done: StepDone) -> None:
        """A stage has computed a step."""

    def released(self, epoch: int, stage: int, keys: Iterable[int]) -> None:
        """A stage touches these requests' pages no more."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""


class KnownCost(CostModel):
    """A cost model that knows, and so learns nothing: for questions about plans, not about fits."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(cost)
        self._known = cost

    @property
    def cost(self) -> Cost:
        """The coefficients."""
        return self._known

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Learn nothing."""


class SimulationStuck(Exception):  # noqa: N818 - it names the event
    """Nothing is due any more, and requests are left: a bug of the scheduler, or of this."""


class PrefillGroup:
    """One group.

    Args:
        clock: shared with other groups.
        scheduler: decides.
        hardware: how long things take.
        page_size: tokens a page.
        on_ready: told (request, time) when the KV of a whole prompt is with its receiver.
        record: whether to keep the bars of the timeline.
        seed: of the noise.
    """

    def __init__(
        self,
        clock: Clock,
        scheduler: Scheduler,
        hardware: Hardware,
        *,
        page_size: int,
        on_ready: Callable[[PrefillRequest, float], None],
        record: bool = True,
        seed: int = 0,
    ) -> None:
        self._clock = clock
        self.scheduler = scheduler
        self._pipeline = Pipeline(hardware, page_size, seed)
        self._control = hardware.control_latency
        self._on_ready = on_ready
        self._record = record
        self._woken = False
        self._grants: dict[int, PrefillRequest] = {}
        self._keys: dict[int, PrefillRequest] = {}
        self.spans: list[StepSpan] = []
        self.steps = 0

    @property
    def busy_seconds(self) -> list[float]:
        """Computed, a stage."""
        return self._pipeline.busy

    def add(self, request: PrefillRequest) -> None:
        """A request arrives now. Raises PromptRefused if it can never be computed here."""
        self.scheduler.add(request, self._clock.now)
        self._grants[request.grant] = request
        self._wake()

    def check_idle(self) -> None:
        """Raise SimulationStuck if something is left."""
        if not self.scheduler.idle or self._grants or self._keys:
            raise SimulationStuck(
                f"at {self._clock.now:.3f} s nothing is due and "
                f"{len(self._grants) + len(self._keys)} prompts are not computed"
            )

    def _wake(self) -> None:
        # Once for all that happens at one time, as an event loop's wake-up does.
        if not self._woken:
            self._woken = True
            self._clock.at(self._clock.now, self._plan)

    def _plan(self) -> None:
        self._woken = False
        while (plan := self.scheduler.next_plan(self._clock.now)) is not None:
            self._carry_out(plan)

    def _carry_out(self, plan: StepPlan) -> None:
        for admit in plan.admit:
            self._keys[admit.key] = self._grants.pop(admit.grant)
        outcome = self._pipeline.carry_out(plan, self._clock.now)
        for stage, (planned, begin, end) in enumerate(outcome.steps):
            done = StepDone(
                epoch=plan.epoch,
                step=plan.step,
                stage=stage,
                compute_seconds=end - begin,
                wait_seconds=begin - planned,
            )
            self._clock.at(end + (self._control if stage else 0.0), self._step_done, done)
        for time, key in outcome.ready:
            self._clock.at(time, self._ready, key)
        for time, stage, key in outcome.released:
            self._clock.at(time, self._released, plan.epoch, stage, key)
        if plan.items:
            self.steps += 1
            if self._record:
                self.spans += spans(plan, outcome)

    def _step_done(self, done: StepDone) -> None:
        self.scheduler.step_done(done)
        self._wake()

    def _released(self, epoch: int, stage: int, key: int) -> None:
        self.scheduler.released(epoch, stage, (key,))
        self._wake()

    def _ready(self, key: int) -> None:
        self._on_ready(self._keys.pop(key), self._clock.now)


ROOT = b"simulated"


def request(
    grant: int, tokens: array[int], page_size: int, *, receiver: str = "decode", cached: int = 0
) -> PrefillRequest:
    """Return a prompt for pages that nobody else uses. `grant` is unique."""
    return PrefillRequest(
        grant=grant,
        receiver=receiver,
        incarnation=1,
        tokens=tokens,
        cached=cached,
        target_pages=tuple(range(-(-len(tokens) // page_size))),
        root=ROOT,
    )


def unlike_tokens(number: int, length: int) -> array[int]:
    """Return a prompt that has no block in common with one of another number.

    Block hashes are chained, so a different first token is enough; all are, which is as cheap.
    """
    return array("i", [number]) * length


def scheduler_for(
    costs: Sequence[Cost],
    pool: PagePool,
    chunks: ChunkSettings | None = None,
    settings: PrefillSettings | None = None,
    *,
    learn: bool = False,
) -> PrefillScheduler:
    """Return the real scheduler of a group whose stages it believes to take `costs`.

    learn: whether it fits these from what it sees, as in production, or takes them for known.
    """
    planner = ChunkPlanner(len(costs), pool.page_size, chunks)
    models = [CostModel(cost) if learn else KnownCost(cost) for cost in costs]
    return PrefillScheduler(len(costs), pool, planner, settings, models)
