"""Whether this process can use RDMA: looked for before the data path is opened, and reported.

UCX would fall back to TCP without a word. So what it may use is decided here, from what the kernel
shows of the devices, and a worker tells which it is.
"""

from __future__ import annotations

import os
from pathlib import Path

TCP = "tcp"
RDMA = "rdma"
_SYS = Path("/sys/class/infiniband")
_DEV = Path("/dev/infiniband")


def missing(sys: Path = _SYS, dev: Path = _DEV) -> str:
    """Return why RDMA cannot be used, with the remedy; empty if it can.

    Args:
        sys: the kernel's directory of RDMA devices, with the state of their ports.
        dev: the directory of device files that a device plugin puts into the container.
    """
    files = sorted(dev.glob("uverbs*"))
    if not files:
        return f"{dev} has no uverbs device: is the RDMA device plugin's resource asked for?"
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        return f"{files[0]} may not be opened by user {os.getuid()}"
    states = [_state(port) for port in sorted(sys.glob("*/ports/*/state"))]
    if not any(state.endswith("ACTIVE") for state in states):
        seen = ", ".join(sorted(set(states))) or "there is none"
        return f"no port of an RDMA device is active ({seen}): check its cable and driver"
    return ""


def ucx_transports(*, rdma: bool, device: str) -> str:
    """Return the UCX transports for a worker whose KV is on `device`, cpu or cuda.

    Reliable connections, and datagrams to set them up, where there is RDMA; TCP in any case, for
    peers without it. Never those of one host (sm, cma): they write past the receiver's fence.
    """
    verbs = ["rc", "ud"] if rdma else []
    memory = ["cuda_copy"] if device == "cuda" else []
    return ",".join([*verbs, "tcp", *memory])


def _state(port: Path) -> str:
    try:
        return port.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return "unreadable"
