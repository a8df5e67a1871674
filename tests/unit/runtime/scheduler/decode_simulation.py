"""A decode worker without a model: the real scheduler, pool and ledger, simulated to the end.

The model is a hash: the next token is a function of all tokens before it. KV memory is simulated,
too: every slot of a page holds the hash of the sequence up to its token, and each computation
checks all slots that it reads. So a page that is reused too early, shared wrongly or left unwritten
shows at once, and every finished request is compared with what the model alone would have said.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from zlib import crc32

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.admission import Local, Rejected, Remote, RemoteSettings
from penstock_runtime.scheduler.cost_model import Cost, CostModel
from penstock_runtime.scheduler.decode import DecodeScheduler, DecodeSettings
from penstock_runtime.scheduler.decode_request import State
from penstock_runtime.transfer.ownership import GrantLedger
from penstock_wire.messages import Sampling, TokenOut

if TYPE_CHECKING:
    from penstock_runtime.scheduler.batch import Batch

VOCABULARY = 7
STOP = 0
STAGES = 2
ROOT = b"r" * 16
COST = Cost(c=1e-3, gamma=0.0, b=1e-3, a=1e-6)


def prefix_hashes(tokens: array[int]) -> list[int]:
    """The KV of each position: a hash of everything up to it."""
    hashes: list[int] = []
    state = 1
    for token in tokens:
        state = crc32(token.to_bytes(4, "little"), state)
        hashes.append(state)
    return hashes


def next_token(tokens: array[int]) -> int:
    return prefix_hashes(tokens)[-1] // 8 % VOCABULARY


def answer(prompt: array[int], sampling: Sampling, max_length: int) -> tuple[list[int], str]:
    """What the model says to a prompt, and why it ends."""
    tokens = array("i", prompt)
    while True:
        tokens.append(next_token(tokens))
        output = len(tokens) - len(prompt)
        if tokens[-1] in sampling.stop_token_ids and output >= sampling.min_tokens:
            return list(tokens[len(prompt) :]), "stop"
        if output == sampling.max_tokens or len(tokens) == max_length:
            return list(tokens[len(prompt) :]), "length"


@dataclass
class Job:
    """One attempt of a prefill group."""

    request_id: str
    grant: int
    tokens: array[int]
    pages: tuple[int, ...]
    done: list[int]
    """Tokens written by each stage."""
    reused: int
    """Tokens that it had not to compute."""


@dataclass
class Simulation:
    pool_pages: int = 64
    page_size: int = 4
    max_model_len: int = 200
    settings: DecodeSettings = field(
        default_factory=lambda: DecodeSettings(
            max_running=8,
            max_batch_tokens=32,
            prefill_seconds=0.008,
            idle_prefill_seconds=0.02,
            remote=RemoteSettings(least_tokens=12, attempts=2, group_wait_seconds=5),
        )
    )
    seed: int = 0
    ahead: bool = False
    """Whether a step is given out while the one before is computed."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.pool = PagePool(self.pool_pages, self.page_size)
        self.ledger = GrantLedger(self.pool)
        settings = replace(self.settings, steps_out=2 if self.ahead else 1)
        self.scheduler = DecodeScheduler(self.pool, self.max_model_len, settings, CostModel(COST))
        self.kv: dict[tuple[int, int, int], int] = {}
        """(page, slot, stage's layers) → hash."""
        self.jobs: dict[int, Job] = {}
        self.revoked: list[Job] = []
        self.now = 0.0
        self.steps: list[str] = []
        """One line a step: request@start+length, a star where a token was sampled."""
        self.streams: dict[str, list[int]] = {}
        self.chosen: dict[str, array[int]] = {}
        """All output tokens that were chosen, those of the requests that had ended included."""
        self.out: deque[Batch] = deque()
        self.finished: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.groups: tuple[str, ...] = ("g",)
        self.group_cached = 0
        """Tokens of every prompt that the group has already."""
        self.prompts: dict[str, tuple[array[int], Sampling]] = {}

    # --- what happens ---------------------------------------------------------------------------

    def add(
        self,
        name: str,
        prompt: array[int],
        sampling: Sampling | None = None,
        *,
        group: str = "",
        force_group: bool = False,
        output: array[int] | None = None,
    ) -> None:
        sampling = sampling or Sampling(seed=0, max_tokens=5)
        output = output if output is not None else array("i")
        self.prompts[name] = (prompt, sampling)
        self.streams[name] = list(output)
        self.chosen[name] = array("i", output)
        end = self.scheduler.add(
            name, prompt, output, sampling, ROOT, group=group, force_group=force_group, now=self.now
        )
        if end is not None:
            self.finished[name] = end.finish

    def cancel(self, name: str) -> None:
        request = self.scheduler.get(name)
        if request is None:
            return
        self.cancelled.add(name)
        delivered = self._revoke(name) if request.state is State.REMOTE else 0
        self.scheduler.cancel(name, delivered)

    def admit(self) -> list[object]:
        admissions = self.scheduler.plan_admission(self.now, self.groups)
        for admission in admissions:
            if isinstance(admission, Remote):
                self._send(admission)
            elif isinstance(admission, Rejected):
                self.finished[admission.request_id] = admission.code
            else:
                assert isinstance(admission, Local)
        return list(admissions)

    def _send(self, remote: Remote) -> None:
        assert len(remote.tokens) > remote.cached
        grant = self.ledger.open(
            incarnation=1,
            writers=["s0/x", "s1/x"],
            pages=remote.pages,
            cached=remote.cached,
            end=len(remote.tokens),
        )
        self._check_kv(remote.tokens, remote.pages, remote.cached)
        self.jobs[grant] = Job(
            remote.request_id,
            grant,
            remote.tokens,
            remote.pages,
            [remote.cached] * STAGES,
            reused=max(remote.cached, self.group_cached),
        )

    def work_remotely(self, grant: int, stage: int, pages: int = 1) -> None:
        """A stage writes some pages of a grant and announces them."""
        job = self.jobs[grant]
        start = job.done[stage]
        end = min(len(job.tokens), (start // self.page_size + pages) * self.page_size)
        if start == end:
            return
        self._write(job.tokens, job.pages, start, end, stage)
        job.done[stage] = end
        delivery = self.ledger.delivered(1, grant, stage, start, end)
        assert delivery is not None
        if delivery.complete:
            del self.jobs[grant]
            self.scheduler.remote_done(job.request_id, job.reused)

    def fail_remotely(self, grant: int) -> None:
        name = self.jobs[grant].request_id
        self.scheduler.remote_failed(name, self._revoke(name))

    def _revoke(self, name: str) -> int:
        job = next(j for j in self.jobs.values() if j.request_id == name)
        del self.jobs[job.grant]
        self.revoked.append(job)
        return self.ledger.revoke(job.grant).tokens

    def acknowledge(self, job: Job) -> None:
        """Until now the stages may have been writing; now they stop."""
        for stage in range(STAGES):
            end = min(len(job.tokens), job.done[stage] + 2 * self.page_size)
            self._write(job.tokens, job.pages, job.done[stage], end, stage)
        for stage in range(STAGES):
            self.ledger.acknowledged(job.grant, stage, f"s{stage}/x")
        self.revoked.remove(job)

    def start_step(self) -> Batch | None:
        batch = self.scheduler.next_batch()
        if batch is not None:
            self.out.append(batch)
        return batch

    def withdraw_step(self) -> None:
        self.scheduler.withdraw_step(self.out.pop())

    def end_step(self, batch: Batch) -> None:
        assert batch is self.out.popleft()
        sampled: list[TokenOut] = []
        line: list[str] = []
        for segment in batch.segments:
            chosen = self.chosen[segment.request_id]
            tokens = (self.prompts[segment.request_id][0] + chosen)[
                : segment.start + segment.length
            ]
            if segment.ahead:
                assert segment.length == 1
                assert tokens[segment.start :] == chosen[-1:]
            else:
                assert tokens[segment.start :] == segment.tokens
            self._check_kv(tokens, segment.pages, segment.start)
            for stage in range(STAGES):
                self._write(tokens, segment.pages, segment.start, len(tokens), stage)
            if segment.sample:
                assert segment.position == len(chosen)
                sampled.append(TokenOut(next_token(tokens)))
                chosen.append(sampled[-1].id)
            star = "*" if segment.sample else ""
            line.append(f"{segment.request_id}@{segment.start}+{segment.length}{star}")
        self.steps.append(" ".join(line))
        for message in self.scheduler.complete_step(batch, sampled):
            stream = self.streams[message.request_id]
            assert message.position == len(stream)
            stream += [token.id for token in message.tokens]
            if message.finish:
                self.finished[message.request_id] = message.finish

    def _write(
        self, tokens: array[int], pages: tuple[int, ...], start: int, end: int, stage: int
    ) -> None:
        hashes = prefix_hashes(tokens)
        for position in range(start, end):
            page = pages[position // self.page_size]
            self.kv[page, position % self.page_size, stage] = hashes[position]

    def _check_kv(self, tokens: array[int], pages: tuple[int, ...], end: int) -> None:
        hashes = prefix_hashes(tokens)
        for position in range(end):
            page = pages[position // self.page_size]
            for stage in range(STAGES):
                assert self.kv.get((page, position % self.page_size, stage)) == hashes[position]

    # --- to the end -----------------------------------------------------------------------------

    def turn(self) -> bool:
        """One admission and one step, everything remote at once; False if nothing was to do."""
        admitted = self.admit()
        for grant in list(self.jobs):
            while grant in self.jobs:
                for stage in range(STAGES):
                    if grant in self.jobs:
                        self.work_remotely(grant, stage)
        out = self._start_steps()
        if self.out:
            self.end_step(self.out[0])
        self.now += 1
        return bool(admitted or out)

    def _start_steps(self) -> int:
        """Give out what there is; return how many steps are out."""
        while self.scheduler.room_for_step and self.start_step():
            pass
        return len(self.out)

    def run(self, limit: int = 2000) -> list[str]:
        """Simulate to the end and return the steps."""
        while self.turn():
            limit -= 1
            assert limit, f"no end in sight: {self.steps[-5:]}"
        self.check_quiet()
        return self.steps

    def random_turn(self, *, cancels: float = 0.0, failures: float = 0.0) -> None:
        """One turn in which anything may happen in between, in any order."""
        self._random_events(cancels, failures)
        self.admit()
        self._start_steps()
        self._random_events(cancels, failures)
        if self.random.random() < 0.3:
            self.admit()
        if len(self.out) == 2 and self.random.random() < 0.3:
            self.withdraw_step()
            self.admit()
            self._start_steps()
            self._random_events(cancels, failures)
        if self.out:
            self.end_step(self.out[0])
        self.ledger.check()
        self.now += 1

    def _random_events(self, cancels: float, failures: float) -> None:
        if self.prompts and self.random.random() < cancels:
            self.cancel(self.random.choice(sorted(self.prompts)))
        for grant in list(self.jobs):
            if self.random.random() < failures:
                self.fail_remotely(grant)
            elif self.random.random() < 0.7:
                self.work_remotely(
                    grant, self.random.randrange(STAGES), self.random.randrange(1, 5)
                )
        for job in list(self.revoked):
            if self.random.random() < 0.4:
                self.acknowledge(job)
        if self.random.random() < 0.1:
            self.groups = self.random.choice([(), ("g",), ("g", "h"), ("h",)])

    def check_quiet(self) -> None:
        """Everybody has the right answer, and every page is free or cached."""
        for job in list(self.revoked):
            self.acknowledge(job)
        assert self.scheduler.idle
        self.ledger.check()
        counts = self.pool.counts()
        assert counts.resident == counts.granted == counts.quarantined == 0
        limit = min(self.max_model_len, self.pool_pages * self.page_size)
        for name, (prompt, sampling) in self.prompts.items():
            expected, finish = answer(prompt, sampling, limit)
            if name in self.cancelled and name not in self.finished:
                assert self.streams[name] == expected[: len(self.streams[name])]
            elif self.finished[name] != "prefill_lost":
                assert (self.streams[name], self.finished[name]) == (expected, finish)


def prompt_of(length: int, seed: int) -> array[int]:
    """A prompt of its own."""
    generator = random.Random(seed)
    return array("i", (generator.randrange(1, 1000) for _ in range(length)))
