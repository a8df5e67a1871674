"""Hosts on one machine, joined by links of a chosen speed.

Each host is a network namespace with one link to a common switch (a bridge in a namespace of its
own, so the machine's network is not touched). What a host sends is shaped and counted by Linux's
traffic control in two classes: to the other workers, at the link's rate, and to the client, not
limited, so that results on their way out do not compete with what is measured.

Each worker's host has a core of its own, as long as there are some. What is left is the client's,
at least the last core. So one worker has no more of the machine than each of several.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = "client"
_SUBNET = "10.231.7"
_SWITCH = "penstock-switch"
_CLONE_NEWNET = 0x40000000
_WORKERS, _TO_CLIENT = "1:10", "1:20"
_UNLIMITED = "40gbit"
_MTU = "9000"
"""Jumbo frames, as networks between such workers have: headers are 1 % of the bytes."""


@dataclass(frozen=True)
class Links:
    """The hosts of one measurement."""

    hosts: list[str]
    cores: list[int]

    def address(self, host: str) -> str:
        """Return a host's IP address."""
        return f"{_SUBNET}.{9 if host == CLIENT else 10 + self.hosts.index(host)}"

    def command(self, host: str, *command: str) -> tuple[str, ...]:
        """Return the command line that runs a command on a host, on its cores."""
        pinned = ("taskset", "--cpu-list", ",".join(map(str, self._cores_of(host))))
        return ("ip", "netns", "exec", _namespace(host), *pinned, *command)

    def _cores_of(self, host: str) -> list[int]:
        if host == CLIENT:
            return self.cores[len(self.hosts) :] or self.cores[-1:]
        return [self.cores[self.hosts.index(host) % len(self.cores)]]

    def set_rate(self, megabits: float) -> None:
        """Limit what every worker sends to the other workers, in Mbit/s."""
        for host in self.hosts:
            rate = f"{megabits}mbit"
            # Enough for one timer tick: less would lower the rate, much more would hide it.
            burst = max(16_000, int(megabits * 125_000 * 0.004))
            _tc(
                host,
                *("class", "replace", "dev", "eth0", "parent", "1:", "classid", _WORKERS),
                *("htb", "rate", rate, "ceil", rate, "burst", str(burst), "cburst", str(burst)),
                *("quantum", "60000"),
            )

    def sent(self, host: str) -> int:
        """Return the bytes, with all headers, that a worker has sent to the other workers."""
        told = _tc(host, "-s", "class", "show", "dev", "eth0")
        found = re.search(rf"class htb {_WORKERS} .*?Sent (\d+) bytes", told, re.DOTALL)
        assert found is not None, told
        return int(found[1])


@contextlib.contextmanager
def links(workers: int) -> Iterator[Links]:
    """Make hosts w0, w1, … and the client; remove them afterwards. Needs root and iproute2."""
    made = Links([f"w{i}" for i in range(workers)], sorted(os.sched_getaffinity(0)))
    names = [CLIENT, *made.hosts]
    _remove([_SWITCH, *map(_namespace, names)])
    try:
        _ip("netns", "add", _SWITCH)
        _ip("-n", _SWITCH, "link", "add", "switch", "mtu", _MTU, "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "switch", "up")
        for number, host in enumerate(names):
            _plug_in(made, host, f"port{number}")
        for host in made.hosts:
            _shape(made, host)
        made.set_rate(10_000)
        yield made
    finally:
        _remove([_SWITCH, *map(_namespace, names)])


def enter(host: str) -> None:
    """Have this process, and what it starts from now on, run on a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", _namespace(host)).open() as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter the network of {host}: {os.strerror(error)}")


def _plug_in(made: Links, host: str, port: str) -> None:
    namespace = _namespace(host)
    _ip("netns", "add", namespace)
    _ip(
        *("-n", namespace, "link", "add", "eth0", "mtu", _MTU, "type", "veth"),
        *("peer", "name", port, "mtu", _MTU, "netns", _SWITCH),
    )
    _ip("-n", _SWITCH, "link", "set", port, "master", "switch", "up")
    _ip("-n", namespace, "address", "add", f"{made.address(host)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", device, "up")


def _shape(made: Links, host: str) -> None:
    _tc(host, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "10")
    _tc(
        host,
        *("class", "add", "dev", "eth0", "parent", "1:", "classid", _TO_CLIENT),
        *("htb", "rate", _UNLIMITED, "quantum", "60000"),
    )
    client = f"{made.address(CLIENT)}/32"
    _tc(
        host,
        *("filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip"),
        *("u32", "match", "ip", "dst", client, "flowid", _TO_CLIENT),
    )


def _remove(namespaces: list[str]) -> None:
    there = subprocess.run(
        ["ip", "netns", "list"], check=True, capture_output=True, text=True
    ).stdout.split()
    for namespace in namespaces:
        if namespace in there:
            _ip("netns", "delete", namespace)


def _namespace(host: str) -> str:
    return f"penstock-{host}"


def _tc(host: str, *arguments: str) -> str:
    return _run("ip", "netns", "exec", _namespace(host), "tc", *arguments)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
