"""Names and addresses: boot ids, host:port parsing, and how a name becomes an IP address."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class UnresolvedName(Exception):  # noqa: N818 - it names the state
    """A host name that does not resolve."""


def new_boot_id() -> str:
    """Return a random id for this process: a restarted peer is a new peer."""
    return secrets.token_hex(8)


def split_address(address: str) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[v6]:port". Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def bracketed(host: str) -> str:
    """Return the host as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


class Resolver:
    """Turns host names into IP addresses: by DNS, or by a hosts file on one machine.

    The file is a JSON object of names and addresses, and is read again on every look-up, because
    the local cluster rewrites it as processes come and go.
    """

    def __init__(self, hosts_file: Path | None = None) -> None:
        self._hosts_file = hosts_file

    async def resolve(self, host: str) -> str:
        """Return an IP address of `host`. Raises UnresolvedName naming what was asked where."""
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            pass
        if self._hosts_file is not None:
            return self._from_file(self._hosts_file, host)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise UnresolvedName(f"{host} does not resolve: {error}") from error
        return str(found[0][4][0])

    @staticmethod
    def _from_file(path: Path, host: str) -> str:
        try:
            hosts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnresolvedName(
                f"{host} does not resolve: {path} cannot be read: {error}"
            ) from error
        address = hosts.get(host) if isinstance(hosts, dict) else None
        if not isinstance(address, str):
            raise UnresolvedName(f"{host} does not resolve: {path} has no such name")
        return address
