"""Control links over real loopback sockets, within one process."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import zmq
import zmq.asyncio

from penstock_wire.keys import InvalidKeys, Keys
from penstock_wire.messages import Cancel, Hello, Message, Tokens, encode
from penstock_wire.sockets import (
    ControlClient,
    ControlServer,
    LinkDown,
    LinkSettings,
    LinkState,
    Session,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FAST = LinkSettings(heartbeat_seconds=0.05, lease_seconds=0.5, retry_seconds=0.025)
MUTE = LinkSettings(heartbeat_seconds=3600, lease_seconds=7200)
"""No heartbeat comes while a test runs."""


def hello(name: str, boot_id: str = "b0") -> Hello:
    return Hello(role="decode", name=name, boot_id=boot_id)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Server:
    """A ControlServer that records what happens to it, as events to await."""

    def __init__(
        self, address: str, keys: Keys, boot_id: str = "s0", settings: LinkSettings = FAST
    ) -> None:
        self.events: asyncio.Queue[tuple[str, Session, Message | None]] = asyncio.Queue()
        self.state = "ready"
        self.control = ControlServer(
            address,
            hello=lambda: hello("server", boot_id),
            keys=keys,
            on_message=lambda session, message: self.events.put_nowait(
                ("message", session, message)
            ),
            on_join=lambda session: self.events.put_nowait(("join", session, None)),
            on_lost=lambda session: self.events.put_nowait(("lost", session, None)),
            state=lambda: self.state,
            settings=settings,
        )

    async def next(self) -> tuple[str, Session, Message | None]:
        return await asyncio.wait_for(self.events.get(), 5)


class Client:
    """A ControlClient that records its states and messages."""

    def __init__(
        self, address: str, keys: Keys, boot_id: str = "c0", settings: LinkSettings = FAST
    ) -> None:
        self.states: asyncio.Queue[LinkState] = asyncio.Queue()
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.control = ControlClient(
            address,
            hello("client", boot_id),
            keys,
            on_message=self.messages.put_nowait,
            on_state=lambda state, _: self.states.put_nowait(state),
            settings=settings,
        )
        self.control.start()

    async def state(self) -> LinkState:
        return await asyncio.wait_for(self.states.get(), 5)


@asynccontextmanager
async def serving(
    address: str, keys: Keys, boot_id: str = "s0", settings: LinkSettings = FAST
) -> AsyncIterator[Server]:
    server = Server(address, keys, boot_id, settings)
    await server.control.start()
    try:
        yield server
    finally:
        await server.control.close()


@asynccontextmanager
async def connected(
    address: str, keys: Keys, settings: LinkSettings = FAST
) -> AsyncIterator[Client]:
    client = Client(address, keys, settings=settings)
    try:
        yield client
    finally:
        await client.control.close()


async def test_messages_both_ways_after_hello() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server, connected(address, keys) as client:
        assert await client.state() is LinkState.READY
        assert client.control.hello == hello("server", "s0")
        kind, session, _ = await server.next()
        assert (kind, session.hello.name) == ("join", "client")
        client.control.send(Cancel(request_id="r"))
        assert (await server.next())[2] == Cancel(request_id="r")
        session.send(Tokens(request_id="r", position=0, tokens=()))
        got = await asyncio.wait_for(client.messages.get(), 5)
        assert got == Tokens(request_id="r", position=0, tokens=())


async def test_messages_that_are_sent_together_arrive_in_order() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server, connected(address, keys) as client:
        assert await client.state() is LinkState.READY
        _, session, _ = await server.next()
        several = [Tokens(request_id="r", position=i, tokens=()) for i in range(5)]
        session.send(*several[:3])
        session.send(several[3])
        session.send(several[4])
        got = [await asyncio.wait_for(client.messages.get(), 5) for _ in several]
        assert got == several


async def test_client_waits_for_a_server_that_comes_later() -> None:
    keys, address = Keys.generate(), free_address()
    async with connected(address, keys) as client:
        with pytest.raises(LinkDown, match="connecting"):
            client.control.send(Cancel(request_id="r"))
        async with serving(address, keys):
            assert await client.state() is LinkState.READY


async def test_restarted_server_is_lost_then_a_new_peer() -> None:
    keys, address = Keys.generate(), free_address()
    async with connected(address, keys) as client:
        async with serving(address, keys, "s0"):
            assert await client.state() is LinkState.READY
        assert await client.state() is LinkState.LOST
        async with serving(address, keys, "s1"):
            assert await client.state() is LinkState.READY
            assert client.control.hello is not None
            assert client.control.hello.boot_id == "s1"


async def test_server_notices_a_client_that_went_away() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server:
        async with connected(address, keys):
            kind, session, _ = await server.next()
            assert kind == "join"
        assert (await server.next())[:2] == ("lost", session)
        with pytest.raises(LinkDown, match="lost"):
            session.send(Cancel(request_id="r"))


async def test_a_new_connection_of_the_same_process_ends_the_old_one_first() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server:
        async with connected(address, keys), connected(address, keys):
            first = await server.next()
            lost = await server.next()
            second = await server.next()
        assert [kind for kind, _, _ in (first, lost, second)] == ["join", "lost", "join"]
        assert lost[1] is first[1]
        assert second[1] is not first[1]


async def test_a_silent_peer_is_lost_with_its_lease_not_at_the_next_heartbeat() -> None:
    keys, address = Keys.generate(), free_address()
    impatient = LinkSettings(heartbeat_seconds=3600, lease_seconds=0.5)
    async with (
        serving(address, keys, settings=MUTE),
        connected(address, keys, impatient) as client,
    ):
        assert await client.state() is LinkState.READY
        assert await client.state() is LinkState.LOST


async def test_draining_travels_with_heartbeats() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server, connected(address, keys) as client:
        assert await client.state() is LinkState.READY
        server.state = "draining"
        assert await client.state() is LinkState.DRAINING
        assert client.control.up


async def test_a_peer_without_the_key_is_refused() -> None:
    keys, stranger, address = Keys.generate(), Keys.generate(), free_address()
    # It knows the public key (it can encrypt to the server) but is not the service's own key.
    half = Keys(public=stranger.public, secret=stranger.secret)
    async with serving(address, keys) as server:
        context = zmq.asyncio.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.curve_serverkey = keys.public
        dealer.curve_publickey, dealer.curve_secretkey = half.public, half.secret
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        dealer.connect(f"tcp://{address}")
        await dealer.send(encode(hello("stranger")))
        await asyncio.wait_for(monitor.recv_multipart(), 5)
        async with connected(address, keys):
            assert (await server.next())[1].hello.name == "client"
        dealer.disable_monitor()
        monitor.close(linger=0)
        dealer.close(linger=0)
        context.term()


async def test_garbage_is_dropped_and_the_link_goes_on() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys) as server, connected(address, keys) as client:
        assert await client.state() is LinkState.READY
        await server.next()
        client.control._post(b"\xc1 not msgpack")
        client.control.send(Cancel(request_id="after"))
        assert (await server.next())[2] == Cancel(request_id="after")


async def test_bind_error_names_the_address() -> None:
    keys, address = Keys.generate(), free_address()
    async with serving(address, keys):
        with pytest.raises(OSError, match=address):
            await Server(address, keys).control.start()


def test_keys_are_private_and_checked(tmp_path: Path) -> None:
    keys = Keys.generate()
    keys.save(tmp_path / "keys")
    assert Keys.load(tmp_path / "keys") == keys
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "keys" / "curve.secret").stat().st_mode & 0o777 == 0o600
    assert keys.secret.decode() not in repr(keys)
    (tmp_path / "keys" / "curve.public").write_bytes(Keys.generate().public)
    with pytest.raises(InvalidKeys, match="does not belong"):
        Keys.load(tmp_path / "keys")
    with pytest.raises(InvalidKeys, match="cannot be read"):
        Keys.load(tmp_path / "absent")


async def test_a_change_of_state_is_announced_before_the_next_heartbeat() -> None:
    keys, address = Keys.generate(), free_address()
    states: asyncio.Queue[LinkState] = asyncio.Queue()
    state = "ready"
    server = ControlServer(
        address,
        hello=lambda: hello("server"),
        keys=keys,
        on_message=lambda *_: None,
        on_join=lambda _: None,
        on_lost=lambda _: None,
        state=lambda: state,
        settings=MUTE,
    )
    client = ControlClient(
        address,
        hello("client"),
        keys,
        on_message=lambda _: None,
        on_state=lambda changed, _: states.put_nowait(changed),
        settings=MUTE,
    )
    await server.start()
    client.start()
    try:
        async with asyncio.timeout(5):
            assert await states.get() is LinkState.READY
            state = "draining"
            server.announce()
            assert await states.get() is LinkState.DRAINING
    finally:
        await client.close()
        await server.close()
