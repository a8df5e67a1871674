"""A receiver, its writers and the network as an explicit-state machine around the real ledgers.

Every interleaving is explored. Time is not modelled: whatever may be late, may be arbitrarily late,
so a stopped process (SIGSTOP) is one whose actions are not chosen for a while, and a timeout is the
receiver's freedom to revoke or fence at any moment. What is modelled:

- data path: a write lies in queues and kernel buffers (`moving`), lands, is seen as done by its
  writer, which then sends the announcement. The bytes of a dead writer, and those of a broken
  connection, go on moving until they land or the receiver fences. Writes overtake each other.
- control path: messages are neither ordered among themselves nor with the data path, and all but
  the grant itself may be delivered twice.
- faults, each within a budget: a writer's crash, its restart as a new process (which may be told of
  its predecessor's grants), a connection that breaks under a living writer.

Checked at every step: a write lands only in a page that its own grant holds; a read is served only
from a page that its own grant keeps; a page becomes readable only when every stage's bytes of it
lie there; no page is lost. And wherever nothing more can happen by itself: without a fault nothing
is left in quarantine, and after a fault one fence empties it.
"""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.transfer.ownership import GrantLedger, Revocation
from penstock_runtime.transfer.writer import (
    GrantRevokedError,
    LinkDownError,
    LinkOperation,
    WriterLedger,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from penstock_runtime.transfer.spans import Spans

_M = TypeVar("_M")
Action: TypeAlias = tuple[str, "Callable[[World], None]"]
Message: TypeAlias = tuple[str, int, int, int]
"""(kind, stage, grant or incarnation, floor or token)."""


class ViolationError(Exception):
    """A rule was broken; the message ends with the actions that led there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How large a world is explored."""

    stages: int
    tokens: int
    """Of a request; a page holds one token, and one write carries one."""
    cached: int = 0
    grants: int = 2
    crashes: int = 1
    breaks: int = 1
    fences: int = 1
    duplicates: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The rules under test; a mutation replaces one of them."""

    ledger: type[GrantLedger] = GrantLedger
    writer: type[WriterLedger] = WriterLedger
    free_on_timeout: bool = False
    free_when_dead: bool = False
    any_process_acknowledges: bool = False
    link_restarted: bool = False


@dataclass
class Op:
    """One page's transfer. `entry` is the writer's own record of it."""

    stage: int
    boot: int
    grant: int
    token: int
    page: int
    is_write: bool
    incarnation: int
    state: str
    """moving, landed, or cut (by a fence; its writer will see a lost peer)."""
    entry: LinkOperation | None
    """None: no living writer waits for it."""

    def key(self) -> tuple[object, ...]:
        waits = self.entry is not None
        return (self.boot, self.grant, self.token, self.incarnation, self.state, waits)


@dataclass
class Work:
    """What a stage still has to do for a grant: tokens before `cached` are read."""

    incarnation: int
    pages: tuple[int, ...]
    cached: int
    next: int = 0


@dataclass
class Writer:
    """A stage's process."""

    boot: int
    ledger: WriterLedger
    link: int
    alive: bool = True
    work: dict[int, Work] = field(default_factory=dict)


@dataclass
class World:
    """Everything there is. `actions` yields what may happen next."""

    bounds: Bounds
    rules: Rules
    pool: PagePool
    ledger: GrantLedger
    writers: list[Writer]
    incarnation: int = 1
    opened: int = 0
    faulty: bool = False
    ops: list[Op] = field(default_factory=list)
    to_writers: set[Message] = field(default_factory=set)
    to_receiver: set[tuple[str, int, int, int, int]] = field(default_factory=set)
    """(kind, stage, boot, grant, token)."""
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    """(page, stage) → the grant whose bytes lie there."""
    pages_of: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What the messages about a grant carry."""

    # --- what may happen ----------------------------------------------------------------------

    def progress(self) -> Iterator[Action]:
        """Yield what happens by itself if nothing is stopped."""
        for message in sorted(self.to_writers):
            if self.writers[message[1]].alive:
                yield f"writer gets {message}", partial(World.tell_writer, message=message)
        for note in sorted(self.to_receiver):
            yield f"receiver gets {note}", partial(World.tell_receiver, note=note)
        for stage, writer in enumerate(self.writers):
            for grant in sorted(writer.work.keys() - self._loading(stage)):
                yield f"{stage} posts for {grant}", partial(World.post, stage=stage, grant=grant)
        for index, op in enumerate(self.ops):
            if op.state == "moving":
                yield f"lands {op.stage} {op.key()}", partial(World.land, index=index)
            elif op.entry is not None:
                yield f"seen {op.stage} {op.key()}", partial(World.see, index=index)

    def _loading(self, stage: int) -> set[int]:
        """Grants whose prefix a stage still reads: it computes, and writes, only after that."""
        return {op.grant for op in self.ops if op.stage == stage and op.entry and not op.is_write}

    def choices(self) -> Iterator[Action]:
        """Yield what the receiver or fate may decide at any moment."""
        if self.opened < self.bounds.grants and self._may_open():
            yield "open", World.open
        for grant in self.ledger.open_grants(self.incarnation):
            yield f"revoke {grant}", partial(World.revoke, grant=grant)
        if self.bounds.fences and self.ledger.floor() <= self.opened:
            yield "fence", World.fence
        if self.bounds.duplicates:
            yield from self._duplicates()
        yield from self._faults()
        yield from self._mutations()

    def _duplicates(self) -> Iterator[Action]:
        for message in sorted(self.to_writers):
            # A grant itself is told once; the rest may be repeated by its sender.
            if message[0] != "grant" and self.writers[message[1]].alive:
                yield f"twice {message}", partial(World.tell_writer, message=message, again=True)
        for note in sorted(self.to_receiver):
            yield f"twice {note}", partial(World.tell_receiver, note=note, again=True)

    def _faults(self) -> Iterator[Action]:
        for stage, writer in enumerate(self.writers):
            if not writer.alive:
                yield f"restart {stage}", partial(World.restart, stage=stage)
            elif self.bounds.crashes:
                yield f"crash {stage}", partial(World.crash, stage=stage)
            if self.bounds.breaks and any(op.entry and op.stage == stage for op in self.ops):
                yield f"break {stage}", partial(World.break_link, stage=stage)

    def _mutations(self) -> Iterator[Action]:
        for grant in self.ledger.quarantined(self.incarnation):
            for stage in sorted(self.ledger.awaited(grant)):
                writer = self.writers[stage]
                if self.rules.free_on_timeout or (self.rules.free_when_dead and not writer.alive):
                    yield (
                        f"free {grant} of {stage}",
                        partial(World.acknowledge, grant=grant, stage=stage, boot=writer.boot),
                    )

    # --- the receiver -------------------------------------------------------------------------

    def _may_open(self) -> bool:
        linked = all(w.alive and w.link == self.incarnation for w in self.writers)
        return linked and self.pool.available() >= self.bounds.tokens

    def open(self) -> None:
        pages = self.pool.allocate(self.bounds.tokens)
        grant = self.ledger.open(
            incarnation=self.incarnation,
            writers=[_name(w.boot) for w in self.writers],
            pages=pages,
            cached=self.bounds.cached,
            end=self.bounds.tokens,
        )
        self.opened = grant
        for stage in range(len(self.writers)):
            self.to_writers.add(("grant", stage, grant, self.incarnation))
        self.pages_of[grant] = tuple(pages)

    def revoke(self, grant: int) -> None:
        self._keep(self.ledger.revoke(grant))
        floor = self.ledger.floor()
        for stage in range(len(self.writers)):
            self.to_writers.add(("revoke", stage, grant, floor))

    def _keep(self, revocation: Revocation) -> None:
        self._read(revocation.grant, revocation.pages)

    def _read(self, grant: int, pages: tuple[int, ...]) -> None:
        """The request reads its delivered pages, and ends."""
        for page in pages[self.bounds.cached :]:
            for stage in range(self.bounds.stages):
                if self.memory.get((page, stage)) != grant:
                    raise ViolationError(f"page {page} is read before stage {stage} wrote it")
        self.pool.release(pages)
        # What is forgotten here could have no effect; keeping it would only multiply states.
        self.to_receiver = {n for n in self.to_receiver if n[0] == "ack" or n[3] != grant}
        self.memory = {at: g for at, g in self.memory.items() if g != grant}

    def fence(self) -> None:
        self.bounds = replace(self.bounds, fences=self.bounds.fences - 1)
        for op in list(self.ops):
            if op.incarnation == self.incarnation and op.state == "moving":
                op.state = "cut"
                if op.entry is None:
                    self.ops.remove(op)
        for revocation in self.ledger.fenced(self.incarnation):
            self._keep(revocation)
        self.incarnation += 1
        for stage in range(len(self.writers)):
            self.to_writers.add(("link", stage, self.incarnation, self.writers[stage].boot))

    def tell_receiver(self, note: tuple[str, int, int, int, int], *, again: bool = False) -> None:
        self._deliver_once(self.to_receiver, note, again=again)
        kind, stage, boot, grant, token = note
        if kind == "ack":
            self.acknowledge(grant, stage, boot)
            return
        delivery = self.ledger.delivered(self.incarnation, grant, stage, token, token + 1)
        if delivery is not None and delivery.complete:
            self._read(grant, self.pages_of[grant])

    def acknowledge(self, grant: int, stage: int, boot: int) -> None:
        name = _name(boot)
        if self.rules.any_process_acknowledges and stage in self.ledger.awaited(grant):
            name = self.ledger._quarantined[grant].writers[stage]
        self.ledger.acknowledged(grant, stage, name)

    # --- the writers --------------------------------------------------------------------------

    def tell_writer(self, message: Message, *, again: bool = False) -> None:
        self._deliver_once(self.to_writers, message, again=again)
        kind, stage, number, extra = message
        writer = self.writers[stage]
        if kind == "link":
            # A link is opened to a process (name, boot_id); other messages may reach a successor.
            if extra == writer.boot:
                writer.link = max(writer.link, number)
                writer.ledger.link_opened(number)
        elif kind == "revoke":
            writer.ledger.revoke(number, extra)
            self._acknowledge_from(stage)
        else:
            writer.work[number] = Work(extra, self.pages_of[number], self.bounds.cached)

    def _acknowledge_from(self, stage: int) -> None:
        writer = self.writers[stage]
        for grant in writer.ledger.take_acknowledgements():
            self.to_receiver.add(("ack", stage, writer.boot, grant, 0))

    def post(self, stage: int, grant: int) -> None:
        writer = self.writers[stage]
        work = writer.work[grant]
        token = work.next
        is_write = token >= work.cached
        try:
            if is_write:
                entry = writer.ledger.begin_write(grant, work.incarnation, token, token + 1)
            else:
                entry = writer.ledger.begin_read(grant, work.incarnation)
        except (GrantRevokedError, LinkDownError):
            del writer.work[grant]
            writer.ledger.finish(grant)
            return
        work.next += 1
        if work.next == len(work.pages):
            del writer.work[grant]
            writer.ledger.finish(grant)
        # The receiver's fence may have come first: then the post finds its peer lost.
        state = "moving" if work.incarnation == self.incarnation else "cut"
        page = work.pages[token]
        self.ops.append(
            Op(stage, writer.boot, grant, token, page, is_write, work.incarnation, state, entry)
        )

    def land(self, index: int) -> None:
        op = self.ops[index]
        writable, readable = self._pages_of_grant(op.grant)
        if op.is_write:
            if op.page not in writable:
                state = self.pool.state(op.page)
                raise ViolationError(f"a write of grant {op.grant} lands in a {state} page")
            if self.ledger.is_open(op.grant):
                self.memory[op.page, op.stage] = op.grant
        elif op.page not in readable:
            raise ViolationError(f"grant {op.grant} reads page {op.page}, which it keeps no more")
        op.state = "landed"
        if op.entry is None:
            self.ops.remove(op)

    def _pages_of_grant(self, grant: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the pages that the ledger keeps for this grant's writes, and for its reads."""
        if grant in self.ledger._open:
            entry = self.ledger._open[grant]
            return entry.pages[entry.first :], entry.lent
        if grant in self.ledger._quarantined:
            waiting = self.ledger._quarantined[grant]
            return waiting.pages, waiting.lent
        return (), ()

    def see(self, index: int) -> None:
        """The writer learns how its operation ended."""
        op = self.ops.pop(index)
        ledger = self.writers[op.stage].ledger
        assert op.entry is not None
        if op.state == "cut":
            ledger.failed(op.entry)
        else:
            ledger.done(op.entry)
            if op.is_write and self.ledger.is_open(op.grant):
                note = ("done", op.stage, op.boot, op.grant, op.token)
                self.to_receiver.add(note)
        self._acknowledge_from(op.stage)

    # --- faults -------------------------------------------------------------------------------

    def crash(self, stage: int) -> None:
        self.bounds = replace(self.bounds, crashes=self.bounds.crashes - 1)
        self.faulty = True
        self._orphan(stage)
        writer = self.writers[stage]
        writer.alive = False
        writer.work.clear()

    def restart(self, stage: int) -> None:
        writer = Writer(self.writers[stage].boot + 1, self.rules.writer(), link=0)
        self.writers[stage] = writer
        if self.rules.link_restarted:
            writer.link = self.incarnation
            writer.ledger.link_opened(self.incarnation)

    def break_link(self, stage: int) -> None:
        """The writer's connection fails under it; what is on its way stays on its way."""
        self.bounds = replace(self.bounds, breaks=self.bounds.breaks - 1)
        self.faulty = True
        for entry in self._orphan(stage):
            self.writers[stage].ledger.failed(entry)
        self._acknowledge_from(stage)

    def _orphan(self, stage: int) -> list[LinkOperation]:
        """Nobody waits for this stage's operations any more; its writes go on by themselves."""
        entries = []
        for op in list(self.ops):
            if op.stage == stage and op.entry is not None:
                entries.append(op.entry)
                op.entry = None
                if op.state != "moving" or not op.is_write:
                    self.ops.remove(op)
        return entries

    def _deliver_once(self, channel: set[_M], message: _M, *, again: bool) -> None:
        if again:
            self.bounds = replace(self.bounds, duplicates=self.bounds.duplicates - 1)
        else:
            channel.discard(message)

    # --- for the search -----------------------------------------------------------------------

    def check(self) -> None:
        self.ledger.check()

    def check_end(self) -> None:
        """Nothing happens by itself any more: is everything accounted for?"""
        if not self.faulty and self.incarnation == 1:
            counts = self.pool.counts()
            if counts.granted or counts.quarantined:
                raise ViolationError(f"without a fault this is left: {counts}")
        self.bounds = replace(self.bounds, fences=self.bounds.fences + 1)
        self.fence()
        counts = self.pool.counts()
        if counts.free != counts.total:
            raise ViolationError(f"a fence leaves {counts}")

    def key(self) -> tuple[object, ...]:
        """Return what distinguishes this state from others, whatever the stages' numbers."""
        return min((self._key(order) for order in self._orders()), key=hash)

    def _orders(self) -> Iterator[tuple[int, ...]]:
        return permutations(range(len(self.writers)))

    def _key(self, new: tuple[int, ...]) -> tuple[object, ...]:
        """Return the key with stage s called new[s]."""
        old = sorted(range(len(new)), key=new.__getitem__)
        bounds = self.bounds
        return (
            (bounds.crashes, bounds.breaks, bounds.fences, bounds.duplicates),
            self.incarnation,
            self.faulty,
            self.opened,
            tuple(self.pool._free),
            tuple(sorted(self.pool._references.items())),
            tuple(
                (
                    g,
                    e.incarnation,
                    e.pages,
                    tuple((e.writers[s], _spans(e.announced[s])) for s in old),
                )
                for g, e in self.ledger._open.items()
            ),
            tuple(
                (g, e.incarnation, e.pages, tuple(e.writers.get(s) for s in old))
                for g, e in self.ledger._quarantined.items()
            ),
            tuple(_writer_key(self.writers[s]) for s in old),
            frozenset((new[op.stage], *op.key()) for op in self.ops),
            frozenset((kind, new[stage], *rest) for kind, stage, *rest in self.to_writers),
            frozenset((kind, new[stage], *rest) for kind, stage, *rest in self.to_receiver),
            frozenset((page, new[stage], grant) for (page, stage), grant in self.memory.items()),
        )


def _spans(spans: Spans) -> tuple[object, ...]:
    return (tuple(spans._starts), tuple(spans._ends))


def _writer_key(writer: Writer) -> tuple[object, ...]:
    ledger = writer.ledger
    entries = tuple(
        (g, _spans(e.posted), len(e.under_way), e.uncertain, e.finished)
        for g, e in sorted(ledger._entries.items())
    )
    work = tuple((g, w.incarnation, w.next) for g, w in sorted(writer.work.items()))
    return (
        writer.boot,
        writer.alive,
        writer.link,
        work,
        entries,
        frozenset(ledger._revoked),
        frozenset(ledger._unanswered),
        ledger._floor,
        ledger._link,
        ledger._broken,
    )


def _name(boot: int) -> str:
    return f"boot {boot}"


def first_world(bounds: Bounds, rules: Rules) -> World:
    pool = PagePool(bounds.tokens, page_size=1)
    writers = [Writer(1, rules.writer(), 1) for _ in range(bounds.stages)]
    for writer in writers:
        writer.ledger.link_opened(1)
    return World(bounds, rules, pool, rules.ledger(pool), writers)


def explore(bounds: Bounds, rules: Rules | None = None) -> int:
    """Visit every state within the bounds and return how many there are.

    Raises ViolationError with the shortest trace that breaks a rule.
    """
    world = first_world(bounds, rules or Rules())
    seen = {world.key()}
    queue: deque[tuple[bytes, tuple[str, ...]]] = deque([(pickle.dumps(world), ())])
    while queue:
        frozen, trace = queue.popleft()
        here: World = pickle.loads(frozen)
        progress = list(here.progress())
        steps = [*progress, *here.choices()]
        for label, step in steps:
            world = pickle.loads(frozen)
            _guarded(world, step, (*trace, label))
            key = world.key()
            if key not in seen:
                seen.add(key)
                queue.append((pickle.dumps(world), (*trace, label)))
        if not progress:
            _guarded(here, World.check_end, (*trace, "end"))
    return len(seen)


def _guarded(world: World, step: Callable[[World], None], trace: tuple[str, ...]) -> None:
    try:
        step(world)
        world.check()
    except (ViolationError, AssertionError) as error:
        path = "\n  ".join(trace)
        raise ViolationError(f"{error}, after\n  {path}") from error
