"""Loopback addresses: every pod is a host of its own, 127.0.NETWORK.HOST.

A supervisor claims a network of 254 addresses by listening on its first one, so the claim ends with
the process, however it ends.
"""

from __future__ import annotations

import errno
import hashlib
import socket
from typing import TYPE_CHECKING

from penstock_operator.errors import NoLoopbackNetwork, PortInUse

if TYPE_CHECKING:
    from collections.abc import Iterable

CLAIM_PORT = 7999
_API_BACKLOG = 2048
"""Connections that may wait for a router to accept them: what comes in while it restarts."""
_FIRST, _COUNT = 64, 190  # 127.0.0, 127.0.1 and 127.0.53 are in use on many systems


class LoopbackNetwork:
    """A claimed 127.0.N.0/24. Not thread-safe; one supervisor owns it."""

    def __init__(self, prefix: str, claim: socket.socket) -> None:
        self._prefix = prefix
        self._claim = claim
        self._used: set[int] = set()
        self._last = 1

    @classmethod
    def claim(cls, name: str, ports: Iterable[int]) -> LoopbackNetwork:
        """Claim a network on whose addresses `ports` are free.

        The search begins at a place that `name` decides, so that a service tends to keep its
        addresses. Raises PortInUse if `ports` are taken everywhere, NoLoopbackNetwork otherwise.
        """
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
        busy: OSError | None = None
        for offset in range(_COUNT):
            prefix = f"127.0.{_FIRST + (start + offset) % _COUNT}"
            listener = socket.socket()
            try:
                listener.bind((f"{prefix}.1", CLAIM_PORT))
                listener.listen(1)
                for port in ports:
                    _try_bind(f"{prefix}.2", port)
            except OSError as error:
                listener.close()
                if error.errno == errno.EADDRNOTAVAIL:
                    raise NoLoopbackNetwork(
                        f"this system has no loopback address {prefix}.1",
                        remedy="run on Linux, where all of 127.0.0.0/8 is loopback",
                    ) from error
                busy = error
                continue
            return cls(prefix, listener)
        listed = ", ".join(map(str, ports))
        raise PortInUse(
            f"a port of the workers ({listed}) is in use on every loopback address: {busy}",
            remedy="find the program that listens on all addresses with `ss -ltnp` and stop it",
        )

    def allocate(self) -> str:
        """Return a free address, the one unused for longest. Raises NoLoopbackNetwork."""
        for step in range(1, 254):
            host = 2 + (self._last - 2 + step) % 253
            if host not in self._used:
                self._used.add(host)
                self._last = host
                return f"{self._prefix}.{host}"
        raise NoLoopbackNetwork(
            f"all 253 addresses of {self._prefix}.0 are in use", remedy="run fewer replicas"
        )

    def release(self, address: str) -> None:
        """Give an address back."""
        self._used.discard(int(address.rpartition(".")[2]))

    def close(self) -> None:
        """Give the network back."""
        self._claim.close()


def _try_bind(host: str, port: int) -> None:
    _listen(host, port, backlog=1).close()


def _listen(host: str, port: int, *, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(backlog)  # two may be bound with SO_REUSEADDR, but only one listens
    except OSError:
        listener.close()
        raise
    return listener


def listen_for_api(host: str, port: int) -> socket.socket:
    """Return the API's listening socket, which routers inherit one after another.

    It stays open for the life of the service, as a cluster's Service stays while its pods come and
    go: connections wait in its backlog while no router accepts them.

    Raises PortInUse if `host`:`port` cannot be listened on.
    """
    try:
        return _listen(host, port, backlog=_API_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"{host}:{port} is in use by another program",
                remedy=f"choose another port with `--port {port + 1}`, or find and stop the "
                f"program: ss -ltnp 'sport = :{port}'",
            ) from error
        raise PortInUse(
            f"the API cannot listen on {host}:{port}: {error}",
            remedy="choose an address of this machine with --host and a port above 1023",
        ) from error
