"""Workers inside the test's event loop that speak the real messages and give deterministic tokens.

The token at output position p is a pure function of (prompt, seed, p), so a continuation on another
worker can be checked exactly. A test steers a worker by its attributes: hold it, kill it, let it
refuse, and read what it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from penstock_router.discovery import Endpoint
from penstock_wire.messages import (
    Cancel,
    Control,
    CostCoefficients,
    Failed,
    Generate,
    Groups,
    Hello,
    Load,
    Message,
    Snapshot,
    Subscribe,
    TokenOut,
    Tokens,
    decode_control,
    encode,
    unpack_tokens,
)
from penstock_wire.sockets import LinkDown, LinkState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock_router.links import OnMessage, OnState

PAGE_SIZE = 4
Chooser = Callable[[Generate, int], int]
"""(request, output position) to a token id."""


def hashed_token(vocabulary: range) -> Chooser:
    """Return a chooser of pseudo-random tokens."""

    def choose(generate: Generate, position: int) -> int:
        data = generate.tokens + generate.sampling.seed.to_bytes(8, "little")
        digest = blake2b(data + position.to_bytes(8, "little"), digest_size=8).digest()
        return vocabulary[int.from_bytes(digest, "little") % len(vocabulary)]

    return choose


def script(tokens: Sequence[int], then: int = 0) -> Chooser:
    """Return a chooser that says `tokens`, and `then` for ever."""
    return lambda _, position: tokens[position] if position < len(tokens) else then


@dataclass(eq=False)
class FakeWorker:
    """A decode worker, or stage 0 of a prefill group."""

    endpoint: Endpoint
    choose: Chooser = field(default_factory=lambda: hashed_token(range(10, 100)))
    boot: int = 1
    kv_layout: str = "layout"
    model_digest: str = "digest"
    pages: int = 1000
    max_model_len: int = 512
    stages: int = 1
    load: Load = field(
        default_factory=lambda: Load(
            state="ready",
            pages_free=1000,
            pages_total=1000,
            cost=CostCoefficients(c=0.001, gamma=0.0, b=1e-5, a=0.0),
            step_seconds=0.01,
        )
    )
    refuse: Failed | None = None
    """Answers everything but canaries."""
    per_message: int = 1
    """Tokens a message."""
    cached_tokens: int = 0
    received: list[Message] = field(default_factory=list)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=lambda: Snapshot(seq=0, hashes=b""))

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        """Tokens flow while it is set."""
        self.gate.set()
        self.pause_at: int | None = None
        """Output position before which the gate closes by itself, and `paused` is set."""
        self.paused = asyncio.Event()
        self.links: list[FakeLink] = []
        self.arrived = asyncio.Event()

    @property
    def name(self) -> str:
        return self.endpoint.name

    def hello(self) -> Hello:
        return Hello(
            role=self.endpoint.role,
            name=self.name,
            boot_id=f"boot-{self.boot}",
            group=self.endpoint.group,
            stages=self.stages,
            kv_layout=self.kv_layout,
            model_digest=self.model_digest,
            pages=self.pages,
            page_size=PAGE_SIZE,
            max_model_len=self.max_model_len,
        )

    def generates(self) -> list[Generate]:
        """What was asked of the worker, canaries left out."""
        return [m for m in self.received if isinstance(m, Generate) and not _is_canary(m)]

    def cancelled(self) -> list[str]:
        return [m.request_id for m in self.received if isinstance(m, Cancel)]

    async def until(self, true: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until `true()`, looked at after each message received."""
        async with asyncio.timeout(seconds):
            while not true():
                self.arrived.clear()
                await self.arrived.wait()

    def publish(self, message: Message) -> None:
        """Send to every router."""
        for link in self.links:
            link.deliver(message)

    def kill(self) -> None:
        """Die at once: nothing that was not delivered yet ever is."""
        for task in self.running.values():
            task.cancel()
        self.running.clear()
        for link in self.links:
            link.change(LinkState.LOST)

    def restart(self) -> None:
        """Come back as another process."""
        self.boot += 1
        for link in self.links:
            link.change(LinkState.READY)

    def take(self, message: Message, link: FakeLink) -> None:
        """Handle one message of a router."""
        self.received.append(message)
        self.arrived.set()
        match message:
            case Subscribe():
                link.deliver(self.snapshot)
                link.deliver(self.load)
            case Generate():
                task = asyncio.create_task(self._answer(message, link))
                self.running[message.request_id] = task
                task.add_done_callback(lambda _: self.running.pop(message.request_id, None))
            case Cancel():
                running = self.running.pop(message.request_id, None)
                if running is not None:
                    running.cancel()

    async def _answer(self, generate: Generate, link: FakeLink) -> None:
        if self.refuse is not None and not _is_canary(generate):
            refusal = self.refuse
            link.deliver(
                Failed(
                    request_id=generate.request_id,
                    code=refusal.code,
                    message=refusal.message,
                    retriable=refusal.retriable,
                )
            )
            return
        position = len(unpack_tokens(generate.output))
        finish = ""
        while not finish:
            tokens: list[TokenOut] = []
            start = position
            while len(tokens) < self.per_message and not finish:
                await self._pass_gate(generate, position)
                token, finish = self._next(generate, position)
                tokens.append(token)
                position += 1
            link.deliver(
                Tokens(
                    request_id=generate.request_id,
                    position=start,
                    tokens=tuple(tokens),
                    finish=finish,  # type: ignore[arg-type]
                    cached_tokens=self.cached_tokens,
                )
            )
            await asyncio.sleep(0)

    async def _pass_gate(self, generate: Generate, position: int) -> None:
        if _is_canary(generate):
            return
        if position == self.pause_at:
            self.pause_at = None
            self.gate.clear()
            self.paused.set()
        await self.gate.wait()

    def _next(self, generate: Generate, position: int) -> tuple[TokenOut, str]:
        sampling = generate.sampling
        token = self.choose(generate, position)
        logprob = None if sampling.logprobs is None else -0.5
        top = tuple((token + k, -0.5 - k) for k in range(sampling.logprobs or 0))
        finish = ""
        if token in sampling.stop_token_ids and position >= sampling.min_tokens:
            finish = "stop"
        elif position + 1 >= sampling.max_tokens:
            finish = "length"
        return TokenOut(token, logprob, top), finish


class FakeLink:
    """A WorkerLink to a FakeWorker: messages pass through the wire's encoding, in order."""

    def __init__(self, worker: FakeWorker, on_message: OnMessage, on_state: OnState) -> None:
        self._worker = worker
        self._on_message = on_message
        self._on_state = on_state
        self.state = LinkState.CONNECTING
        self.hello: Hello | None = None
        self.closed = False

    def start(self) -> None:
        self._worker.links.append(self)
        asyncio.get_running_loop().call_soon(self.change, LinkState.READY)

    def send(self, message: Message) -> None:
        if self.state not in {LinkState.READY, LinkState.DRAINING}:
            raise LinkDown(f"{self._worker.name} is {self.state.value}")
        decoded = _round_trip(message)
        asyncio.get_running_loop().call_soon(self._arrive, decoded)

    async def close(self) -> None:
        self.closed = True
        if self in self._worker.links:
            self._worker.links.remove(self)

    def deliver(self, message: Message) -> None:
        """A message of the worker arrives at the router."""
        if not self.closed and self.state is not LinkState.LOST:
            self._on_message(_round_trip(message))

    def change(self, state: LinkState) -> None:
        """The link's state changes."""
        if self.closed or state is self.state:
            return
        self.state = state
        if state is LinkState.READY:
            self.hello = self._worker.hello()
        self._on_state(state, self.hello)

    def _arrive(self, message: Control) -> None:
        if not self.closed and self.state is not LinkState.LOST:
            self._worker.take(message, self)


class FakeCluster:
    """Discovery and links over fake workers."""

    def __init__(self, *workers: FakeWorker) -> None:
        self.workers = {worker.endpoint.address: worker for worker in workers}
        self.problem = ""
        self._lists: asyncio.Queue[tuple[Endpoint, ...]] = asyncio.Queue()
        self.list(*workers)

    def list(self, *workers: FakeWorker) -> None:
        """Let discovery say that these workers are all there are."""
        self.workers |= {worker.endpoint.address: worker for worker in workers}
        self._lists.put_nowait(tuple(worker.endpoint for worker in workers))

    async def watch(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        while True:
            yield await self._lists.get()

    def connect(self, address: str, on_message: OnMessage, on_state: OnState) -> FakeLink:
        return FakeLink(self.workers[address], on_message, on_state)


def decode_worker(
    name: str = "decode-0", *, groups: tuple[str, ...] = (), **fields: object
) -> FakeWorker:
    """Return a decode worker with links to `groups`."""
    endpoint = Endpoint(name=name, role="decode", address=f"{name}:7000")
    worker = FakeWorker(endpoint, **fields)  # type: ignore[arg-type]
    if groups:
        worker.load = _with(worker.load, groups_ready=groups)
    return worker


def prefill_worker(group: str = "group-0", **fields: object) -> FakeWorker:
    """Return stage 0 of a group of one stage."""
    endpoint = Endpoint(name=f"{group}-0", role="prefill", address=f"{group}-0:7000", group=group)
    return FakeWorker(endpoint, **fields)  # type: ignore[arg-type]


def groups_sent(worker: FakeWorker) -> list[tuple[str, ...]]:
    """The names of the groups in each Groups message that the worker got."""
    return [
        tuple(group.name for group in message.groups)
        for message in worker.received
        if isinstance(message, Groups)
    ]


def _with(load: Load, **changes: object) -> Load:
    import msgspec

    return msgspec.structs.replace(load, **changes)


def _is_canary(generate: Generate) -> bool:
    return generate.request_id.startswith("canary")


def _round_trip(message: Message) -> Control:
    return decode_control(encode(message))
