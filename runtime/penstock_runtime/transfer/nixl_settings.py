"""Settings of the NIXL data path, and how UCX, which moves the bytes, is told of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


class NixlSettingsError(Exception):
    """A setting, or the environment, would make the data path unsafe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NixlSettings:
    """How this process moves bytes. The defaults suit pods joined by TCP."""

    transports: str = "tcp"
    """UCX transports, comma-separated. TCP alone: kernel copies between processes on one host
    (CMA) would write without the receiver's process, so its fence would not stop them. On RDMA
    hosts name the verbs transports beside TCP; never `cma`, nor `all` or `sm`, which contain it.
    For device memory name `cuda_copy`; never `cuda_ipc`, nor `cuda`, which contains it: it maps a
    peer's device memory and writes past its fence as well."""

    devices: str = ""
    """Network devices, comma-separated (`lo`: this host only). Empty: all that UCX finds."""

    peer_silence_seconds: float = 30.0
    """A connection whose peer takes no bytes for this long while a transfer runs is broken off; a
    lost node is noticed by nothing else. Longer than a receiver may stall, which would be a false
    alarm, and shorter than a client's patience."""

    connect_retries: int = 3
    """TCP SYN retransmissions: 3 give up a black-holed address after about 15 s."""

    keepalive_idle_seconds: float = 5.0
    """An idle connection is probed after this long."""

    keepalive_interval_seconds: float = 2.0
    """Between two probes of an idle connection."""

    nap_in_flight_seconds: float = 100e-6
    """Sleep between two polls while bytes move, where sockets cannot be waited for. A poll costs
    some 10 µs: about a tenth of a core while busy. Polling without a nap would take a core from
    compute and gains only 0.2 ms."""

    nap_idle_seconds: float = 1e-3
    """Sleep between two polls while nothing is expected; a first notification comes so much later.
    Costs about 3 % of a core. Where sockets wake the thread this is the longest wait while
    operations are in flight: one in a hundred has a step that no socket tells of."""

    nap_watched_seconds: float = 1.0
    """The longest wait for sockets while nothing is in flight: UCX looks after its connections.
    Before that, a wait lasts for as long as nothing has happened, at least `linger_seconds`. That
    sockets tell of every step of a peer's operations was seen in 2,000 notes, writes and reads
    between two threads that would else have waited for a minute, and is no promise of UCX's: a step
    that they do not tell of is found in about the time that has passed since the one before."""

    spacing_seconds: float = 200e-6
    """Sleep after sockets woke the thread: bytes come in small parts, and a poll for each would
    take longer than moving them."""

    linger_seconds: float = 20e-3
    """Activity this recent counts as busy where sockets cannot be waited for: an answer, or a
    peer's next chunk, is likely soon. A receiver cannot see that bytes come in, only their
    notification. Where they can, the shortest wait while nothing is in flight."""

    log_level: str = "ERROR"
    """NIXL's own messages. Lost peers are reported by exceptions, so its warnings repeat them."""

    def __post_init__(self) -> None:
        """Refuse what would void the ownership rules or never work."""
        unsafe = {"all", "cma", "sm", "shm", "knem", "xpmem", "cuda", "cuda_ipc"}
        unsafe &= set(self.transports.split(","))
        if unsafe or not self.transports:
            raise NixlSettingsError(
                f"transports {self.transports!r} let a peer write past a fence "
                f"({', '.join(sorted(unsafe)) or 'empty means all'}); name network transports only"
            )
        for name in (
            "nap_in_flight_seconds",
            "nap_idle_seconds",
            "nap_watched_seconds",
            "spacing_seconds",
            "peer_silence_seconds",
        ):
            if getattr(self, name) <= 0:
                raise NixlSettingsError(f"{name} is {getattr(self, name)}, it must be positive")

    @property
    def sockets_only(self) -> bool:
        """Whether all bytes go through sockets, which can be waited for."""
        return self.transports == "tcp"

    def ucx_environment(self) -> dict[str, str]:
        """Return UCX's and NIXL's environment variables for these settings."""
        environment = {
            "UCX_TLS": self.transports,
            "UCX_TCP_USER_TIMEOUT": f"{math.ceil(self.peer_silence_seconds * 1000)}ms",
            # Without it, loading a peer's metadata would block until the peer answered the SYN.
            "UCX_TCP_CONN_NB": "y",
            "UCX_TCP_SYN_CNT": str(self.connect_retries),
            "UCX_TCP_KEEPIDLE": f"{math.ceil(self.keepalive_idle_seconds * 1000)}ms",
            "UCX_TCP_KEEPINTVL": f"{math.ceil(self.keepalive_interval_seconds * 1000)}ms",
            "UCX_WARN_UNUSED_ENV_VARS": "n",
            "NIXL_LOG_LEVEL": self.log_level,
        }
        if self.devices:
            environment["UCX_NET_DEVICES"] = self.devices
        return environment

    def apply(self) -> None:
        """Put the settings where UCX reads them: this process's environment.

        Call it before NIXL is imported. Raises NixlSettingsError if UCX was told a port range: a
        restarted process on the same port would receive writes meant for its predecessor.
        """
        if "UCX_TCP_PORT_RANGE" in os.environ:
            raise NixlSettingsError(
                "UCX_TCP_PORT_RANGE is set: with fixed ports a stale peer writes into a restarted "
                "process. Unset it and open the ephemeral ports between workers instead"
            )
        os.environ.update(self.ucx_environment())
