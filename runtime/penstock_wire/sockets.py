"""Control links: ZMQ ROUTER/DEALER under CURVE, with Hello, heartbeats and honest states.

A worker binds one `ControlServer`; whoever wants something of it connects a `ControlClient`. Both
sides send a Heartbeat every `heartbeat_seconds`, a process all of its own at the same moment, and
call the other lost after `lease_seconds` of silence, or at once when the connection breaks. A
server that restarted does not know its clients: it answers Unknown, and the client says Hello
again, to what is now a new peer (another boot_id).

One event loop's thread owns all of it. Sending never blocks: a message that cannot be queued means
that the peer has not read for long, and the link is called lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import parse_monitor_message

from penstock_wire import messages
from penstock_wire.messages import Control, Heartbeat, Hello, Message, Unknown, WireError
from penstock_wire.names import Resolver, UnresolvedName, bracketed, split_address
from penstock_wire.rhythm import until_next
from penstock_wire.tasks import Tasks

if TYPE_CHECKING:
    from penstock_wire.keys import Keys

log = logging.getLogger(__name__)

_LATE_SECONDS = 1e-3
"""By which every wake may be late: not what a process that was itself stopped is forgiven."""


class LinkDown(Exception):  # noqa: N818 - it names the state
    """The peer is not there: a message cannot be sent."""


class LinkState(Enum):
    """What is known of a peer."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSettings:
    """Times in seconds, sizes in messages.

    The lease is a few heartbeats: short enough to notice a stopped process within seconds, long
    enough that a busy machine is not mistaken for a dead one. A mistake costs a recomputed prompt,
    never a wrong answer.
    """

    heartbeat_seconds: float = 1.0
    lease_seconds: float = 4.0
    retry_seconds: float = 0.25
    """Between the end of a connection and the next: a peer that starts anew is found soon."""
    queue_messages: int = 20_000


@dataclass(slots=True, eq=False)
class Session:
    """One client of a ControlServer, from its Hello until it is lost."""

    hello: Hello
    state: LinkState
    last_heard: float
    _server: ControlServer
    _identity: bytes

    def send(self, *several: Message) -> None:
        """Queue messages for the client, in order. Raises LinkDown if the client is lost.

        Those of one call travel as one: that costs about as much as one of them.
        """
        if self.state is LinkState.LOST:
            raise LinkDown(f"{self.hello.name} ({self.hello.boot_id}) is lost")
        self._server._post(self._identity, *map(messages.encode, several))  # noqa: SLF001 - one file


OnSessionMessage: TypeAlias = Callable[[Session, Control], None]
OnSessionLost: TypeAlias = Callable[[Session], None]


class ControlServer:
    """The bound end of control links.

    Args:
        bind: host:port, of an address of this machine.
        hello: called for the answer to a client's Hello (its content may change as a worker loads).
        keys: the service's key pair; clients without it are refused.
        state: called for the state that heartbeats carry.
        on_message: every message but Hello and Heartbeat, from known clients only.
        on_join: a client said Hello.
        on_lost: a client is gone; its session sends no more.
    """

    def __init__(
        self,
        bind: str,
        *,
        hello: Callable[[], Hello],
        keys: Keys,
        on_message: OnSessionMessage,
        on_join: OnSessionLost,
        on_lost: OnSessionLost,
        state: Callable[[], str] = lambda: "ready",
        settings: LinkSettings | None = None,
    ) -> None:
        self._bind = bind
        self._hello = hello
        self._keys = keys
        self._state = state
        self._on_message = on_message
        self._on_join = on_join
        self._on_lost = on_lost
        self._settings = settings or LinkSettings()
        self._sessions: dict[bytes, Session] = {}
        self._tasks = Tasks()

    @property
    def sessions(self) -> list[Session]:
        """The clients that are there now."""
        return list(self._sessions.values())

    async def start(self) -> None:
        """Bind and serve. Raises OSError if the address cannot be bound."""
        host, port = split_address(self._bind)
        self._context = zmq.asyncio.Context()
        self._auth = AsyncioAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback(
            domain="penstock", credentials_provider=_OnlyUs(self._keys)
        )
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket, self._settings)
        self._socket.curve_server = True
        self._socket.curve_secretkey = self._keys.secret
        self._socket.curve_publickey = self._keys.public
        self._socket.zap_domain = b"penstock"
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.bind(f"tcp://{bracketed(host)}:{port}")
        except zmq.ZMQError as error:
            self._auth.stop()
            self._context.destroy(linger=0)
            raise OSError(f"cannot bind the control server to {self._bind}: {error}") from error
        self._tasks.spawn(self._receive(), "control server receive")
        self._tasks.spawn(self._beat(), "control server heartbeat")

    async def close(self) -> None:
        """Stop; what is queued is given a moment to leave."""
        await self._tasks.cancel()
        self._auth.stop()
        self._socket.close(linger=500)
        self._context.destroy(linger=500)

    def _post(self, identity: bytes, *frames: bytes) -> None:
        sent = self._socket.send_multipart([identity, *frames], flags=zmq.DONTWAIT)
        _check_sent(sent, "a client")

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 2:
                continue
            try:
                message = messages.decode_control(frames[1])
            except WireError as error:
                log.warning("dropped a message: %s", error)
                continue
            try:
                self._handle(frames[0], message)
            except LinkDown as error:
                log.info("a client went away: %s", error)

    def _handle(self, identity: bytes, message: Control) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            self._join(identity, message, now)
            return
        session = self._sessions.get(identity)
        if session is None:
            self._post(identity, messages.encode(Unknown(boot_id=self._hello().boot_id)))
            return
        session.last_heard = now
        if isinstance(message, Heartbeat):
            session.state = _peer_state(message.state)
            return
        self._on_message(session, message)

    def _join(self, identity: bytes, hello: Hello, now: float) -> None:
        self._post(identity, messages.encode(self._hello()))
        known = self._sessions.get(identity)
        if known is not None and known.hello.boot_id == hello.boot_id:
            known.last_heard = now
            return
        # A name has one living process with one connection: what came before is over, and whoever
        # watches must hear of its end before the new beginning.
        for other, session in list(self._sessions.items()):
            if (session.hello.role, session.hello.name) == (hello.role, hello.name):
                self._lose(other, session)
        session = Session(hello, LinkState.READY, now, self, identity)
        self._sessions[identity] = session
        self._on_join(session)

    def _lose(self, identity: bytes, session: Session) -> None:
        self._sessions.pop(identity, None)
        session.state = LinkState.LOST
        self._on_lost(session)

    async def _beat(self) -> None:
        now = time.monotonic()
        while True:
            heard = min((each.last_heard for each in self._sessions.values()), default=math.inf)
            now, stalled = await _pause(self._settings, now, heard)
            for identity, session in list(self._sessions.items()):
                session.last_heard += stalled
                if now - session.last_heard >= self._settings.lease_seconds:
                    self._lose(identity, session)
            self.announce()

    def announce(self) -> None:
        """Send a heartbeat to every client now: the state has changed, and they should know."""
        beat = messages.encode(
            Heartbeat(boot_id=self._hello().boot_id, state=self._state())  # type: ignore[arg-type]
        )
        for identity in self._sessions:
            with contextlib.suppress(LinkDown):
                self._post(identity, beat)


OnClientMessage: TypeAlias = Callable[[Control], None]
OnClientState: TypeAlias = Callable[[LinkState, Hello | None], None]


class ControlClient:
    """The connecting end of a control link.

    Args:
        address: host:port of a ControlServer; the host is resolved anew on every connection.
        hello: who I am.
        on_message: every message but Hello, Heartbeat and Unknown.
        on_state: each change, with the peer's Hello (None while connecting for the first time).
            READY with another boot_id than before is always preceded by LOST.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        keys: Keys,
        *,
        on_message: OnClientMessage,
        on_state: OnClientState,
        settings: LinkSettings | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self.address = address
        self._mine = hello
        self._keys = keys
        self._on_message = on_message
        self._on_state = on_state
        self._settings = settings or LinkSettings()
        self._resolver = resolver or Resolver()
        self._tasks = Tasks()
        self._socket: zmq.asyncio.Socket | None = None
        self.state = LinkState.CONNECTING
        self.hello: Hello | None = None
        self._last_heard = 0.0

    def start(self) -> None:
        """Begin to connect, and keep connecting for ever."""
        self._tasks.spawn(self._run(), f"control client {self.address}")

    async def close(self) -> None:
        """Stop. No more callbacks come."""
        await self._tasks.cancel()

    @property
    def up(self) -> bool:
        """Whether the peer is there (it may be draining)."""
        return self.state in {LinkState.READY, LinkState.DRAINING}

    def send(self, message: Message) -> None:
        """Queue a message. Raises LinkDown unless the peer is there."""
        if not self.up or self._socket is None:
            raise LinkDown(f"{self.address} is {self.state.value}")
        self._post(messages.encode(message))

    def _post(self, data: bytes) -> None:
        assert self._socket is not None
        _check_sent(self._socket.send(data, flags=zmq.DONTWAIT), self.address)

    async def _run(self) -> None:
        """Connect again, with a fresh socket, for as long as there is a client.

        A fresh socket each time, so that nothing queued for a dead peer reaches its successor.
        """
        context = zmq.asyncio.Context()
        try:
            while True:
                try:
                    await self._connection(context)
                except UnresolvedName as error:
                    log.debug("%s", error)
                self._lose()
                await asyncio.sleep(self._settings.retry_seconds)
        finally:
            context.destroy(linger=500)

    def _lose(self) -> None:
        self._socket = None
        if self.up:
            self._set_state(LinkState.LOST)

    def _set_state(self, state: LinkState) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state, self.hello)

    async def _connection(self, context: zmq.asyncio.Context) -> None:
        host, port = split_address(self.address)
        ip = await self._resolver.resolve(host)
        socket = context.socket(zmq.DEALER)
        _configure(socket, self._settings)
        socket.curve_serverkey = self._keys.public
        socket.curve_publickey = self._keys.public
        socket.curve_secretkey = self._keys.secret
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        tasks: list[asyncio.Task[None]] = []
        try:
            socket.connect(f"tcp://{bracketed(ip)}:{port}")
            self._socket = socket
            self._last_heard = time.monotonic()
            self._post(messages.encode(self._mine))
            tasks = [
                asyncio.create_task(self._receive(socket)),
                asyncio.create_task(self._beat()),
                asyncio.create_task(self._watch(monitor)),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancel(tasks)
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=500 if self.up else 0)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        """Handle messages until the peer turns out to be another process than before."""
        while True:
            for frame in await socket.recv_multipart():
                try:
                    message = messages.decode_control(frame)
                except WireError as error:
                    log.warning("dropped a message from %s: %s", self.address, error)
                    continue
                self._last_heard = time.monotonic()
                if not self._handle(message):
                    return

    def _handle(self, message: Control) -> bool:
        """Do what a message asks for; tell whether it came from the peer that was there before."""
        if isinstance(message, Unknown):
            if self.up:
                return False
            self._post(messages.encode(self._mine))
        elif isinstance(message, Hello):
            if self.up and self.hello is not None and message.boot_id != self.hello.boot_id:
                return False
            self.hello = message
            self._set_state(LinkState.READY)
        elif isinstance(message, Heartbeat):
            if self.up:
                self._set_state(_peer_state(message.state))
        elif self.up:
            self._on_message(message)
        return True

    async def _beat(self) -> None:
        """Send heartbeats until the lease runs out."""
        now = time.monotonic()
        while True:
            now, stalled = await _pause(self._settings, now, self._last_heard)
            self._last_heard += stalled
            if now - self._last_heard >= self._settings.lease_seconds:
                return
            with contextlib.suppress(LinkDown):
                self._post(messages.encode(Heartbeat(boot_id=self._mine.boot_id)))

    @staticmethod
    async def _watch(monitor: zmq.asyncio.Socket) -> None:
        """Return when the connection breaks."""
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                return


class _OnlyUs:
    """Accept exactly the service's own key."""

    def __init__(self, keys: Keys) -> None:
        self._public = keys.public

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - pyzmq's interface
        return key == self._public


async def _pause(settings: LinkSettings, begun: float, last_heard: float) -> tuple[float, float]:
    """Wait from `begun` for the next heartbeat, or the end of the lease of what was `last_heard`.

    Returns when it is, and by how much that is late: a process that was itself stopped must not
    blame its peers for the silence.
    """
    lease = last_heard + settings.lease_seconds - begun
    seconds = max(0.0, min(lease, until_next(settings.heartbeat_seconds)))
    await asyncio.sleep(seconds)
    now = time.monotonic()
    # Every wake is a little late. Were that forgiven, too, no lease would end but by rounding.
    late = now - begun - seconds
    return now, late if late > _LATE_SECONDS else 0.0


def _peer_state(state: str) -> LinkState:
    return LinkState.DRAINING if state == "draining" else LinkState.READY


def _configure(socket: zmq.asyncio.Socket, settings: LinkSettings) -> None:
    socket.setsockopt(zmq.SNDHWM, settings.queue_messages)
    socket.setsockopt(zmq.RCVHWM, settings.queue_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)


def _check_sent(sent: Awaitable[object], peer: str) -> None:
    """Raise LinkDown if a non-blocking send failed; zmq.asyncio tries it before it returns."""
    assert isinstance(sent, asyncio.Future)
    if sent.done() and (error := sent.exception()) is not None:
        raise LinkDown(f"{peer} is gone or does not read: {error}") from error


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
