"""Waiting for UCX's sockets: which descriptors are meant, and what ends a wait."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import closing

from penstock_runtime.transfer.sockets import Sockets, event_sets


def test_sets_of_sockets_are_found_and_sets_of_sets_are_not() -> None:
    known = event_sets()
    here, there = socket.socketpair()
    with here, there, select.epoll() as inner, select.epoll() as outer:
        inner.register(here, select.EPOLLIN)
        outer.register(inner, select.EPOLLIN)
        outer.register(there, select.EPOLLIN)
        assert event_sets() - known == {inner.fileno()}
    assert event_sets() <= known


def test_ready_sockets_end_a_wait_and_say_so() -> None:
    here, there = socket.socketpair()
    with here, there, select.epoll() as event_set, closing(Sockets()) as sockets:
        event_set.register(there, select.EPOLLIN)
        sockets.watch(event_set.fileno())
        assert not sockets.wait(0)
        here.send(b"x")
        assert sockets.wait(60)
        assert sockets.wait(60), "it is still there"
        there.recv(1)
        assert not sockets.wait(0)
        sockets.forget(event_set.fileno())
        here.send(b"x")
        assert not sockets.wait(0)


def test_a_set_that_was_closed_by_its_owner_is_forgotten() -> None:
    here, there = socket.socketpair()
    with here, there, closing(Sockets()) as sockets:
        event_set = select.epoll()
        event_set.register(there, select.EPOLLIN)
        sockets.watch(number := event_set.fileno())
        here.send(b"x")
        event_set.close()
        assert not sockets.wait(0)
        sockets.forget(number)


def test_a_ring_ends_one_wait() -> None:
    with closing(Sockets()) as sockets:
        sockets.ring()
        sockets.ring()
        assert not sockets.wait(60)
        assert not sockets.wait(0)
        waiter = threading.Thread(target=sockets.wait, args=(60,))
        waiter.start()
        sockets.ring()
        waiter.join(10)
        assert not waiter.is_alive()
