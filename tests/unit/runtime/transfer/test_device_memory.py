"""How arenas in device memory reach NIXL: kind of memory and device index, on both sides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from penstock_runtime.transfer.base import Region, TransferError
from penstock_runtime.transfer.metadata import AgentMetadata
from penstock_runtime.transfer.nixl_endpoint import Endpoint, NixlLibrary, Operation
from penstock_runtime.transfer.rdma import ucx_transports

OURS, THEIRS = 0x7F0000000000, 0x7E0000000000
SIZE = 1 << 20


class RecordingAgent:
    """NIXL's agent as far as an endpoint calls it; keeps what it was given."""

    def __init__(self, name: str, config: object) -> None:
        self.agent = SimpleNamespace()
        self.registered: list[tuple[list[tuple[int, int, int, str]], str]] = []
        self.descriptors: list[tuple[list[list[int]], str]] = []

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> object:
        self.registered.append((regions, kind))
        return regions

    def get_agent_metadata(self) -> bytes:
        return b"metadata"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def get_xfer_descs(self, rows: Any, kind: str) -> str:
        assert rows.dtype == np.uint64
        self.descriptors.append((rows.tolist(), kind))
        return kind

    def initialize_xfer(self, *arguments: object) -> object:
        return SimpleNamespace(release=lambda: None)

    def transfer(self, handle: object) -> str:
        return "DONE"


def endpoint(regions: list[Region]) -> tuple[Endpoint, RecordingAgent]:
    made: list[RecordingAgent] = []

    def agent(name: str, config: object) -> RecordingAgent:
        made.append(RecordingAgent(name, config))
        return made[0]

    library = SimpleNamespace(agent=agent, config=lambda **_: None, errors=(KeyError,))
    return Endpoint(cast("NixlLibrary", library), "ours", regions), made[0]


def operation(local: int, remote: int) -> tuple[Operation, list[TransferError | None]]:
    ended: list[TransferError | None] = []
    ranges = [np.array([[address, 64]], np.uint64) for address in (local, remote)]
    return Operation("WRITE", "theirs", ranges[0], ranges[1], 64, b"note", 1.0, ended.append), ended


def test_regions_are_registered_as_what_they_are() -> None:
    regions = [Region(OURS, SIZE, 3), Region(0x1000, 4096)]
    _, agent = endpoint(regions)
    assert agent.registered == [
        ([(OURS, SIZE, 3, "")], "VRAM"),
        ([(0x1000, 4096, 0, "")], "DRAM"),
    ]


@pytest.mark.parametrize(("device", "kind"), [(1, "VRAM"), (None, "DRAM")])
def test_descriptors_name_each_sides_own_memory(device: int | None, kind: str) -> None:
    """The peer's device index is the peer's, also where it differs from ours, or has none."""
    ours, agent = endpoint([Region(OURS, SIZE, 0)])
    ours.connect(AgentMetadata("theirs", [Region(THEIRS, SIZE, device)], b"theirs").encode())
    write, ended = operation(OURS + 128, THEIRS + 256)
    ours.start(write)
    assert ended == [None]
    assert agent.descriptors == [
        ([[OURS + 128, 64, 0]], "VRAM"),
        ([[THEIRS + 256, 64, device or 0]], kind),
    ]


def test_a_worker_on_cuda_lets_ucx_copy_device_memory_and_nothing_past_a_fence() -> None:
    assert ucx_transports(rdma=False, device="cuda") == "tcp,cuda_copy"
    assert ucx_transports(rdma=True, device="cuda") == "rc,ud,tcp,cuda_copy"
    assert ucx_transports(rdma=False, device="cpu") == "tcp"
