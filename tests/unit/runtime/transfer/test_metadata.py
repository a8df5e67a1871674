"""Agent metadata and ranges come from peers: they are checked, and decoded strictly."""

from __future__ import annotations

from contextlib import nullcontext

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.transfer.base import PeerLost, Region
from penstock_runtime.transfer.metadata import (
    MAX_METADATA_BYTES,
    AgentMetadata,
    OutsideRegionsError,
    check_pairs,
    devices_of,
)

REGIONS = [Region(1000, 100), Region(5000, 50, device=3), Region(2**63 - 64, 63)]


def ranges(*rows: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.array(rows, np.uint64).reshape(len(rows), 2)


def test_metadata_comes_back() -> None:
    again = AgentMetadata.decode(AgentMetadata("decode/1#2", REGIONS, b"ucx").encode())
    assert (again.name, again.regions, again.endpoint) == ("decode/1#2", tuple(REGIONS), b"ucx")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        bytes(MAX_METADATA_BYTES + 1),
        msgspec.msgpack.encode(["", [], b""]),
        msgspec.msgpack.encode(["a", [[-1, 4, None]], b""]),
        msgspec.msgpack.encode(["a", [[2**63, 4, None]], b""]),
        msgspec.msgpack.encode(["a", [[0, 4, 2**16]], b""]),
        msgspec.msgpack.encode(["a", [[0, 4, None]] * 65, b""]),
        msgspec.msgpack.encode(["\ud800".encode("utf-16-le", "surrogatepass"), [], b""]),
    ],
)
def test_other_bytes_are_no_metadata(data: bytes) -> None:
    with pytest.raises(PeerLost, match="metadata"):
        AgentMetadata.decode(data)


def test_devices_are_those_of_the_regions() -> None:
    devices, on_device = devices_of(ranges((1000, 100), (1099, 1), (2**63 - 64, 63)), REGIONS)
    assert (devices.tolist(), on_device) == ([0, 0, 0], False)
    devices, on_device = devices_of(ranges((5000, 50), (5010, 10)), REGIONS)
    assert (devices.tolist(), on_device) == ([3, 3], True)
    with pytest.raises(ValueError, match="mixes"):
        devices_of(ranges((1000, 1), (5000, 1)), REGIONS)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_no_range_leaves_its_region(address: int, nbytes: int) -> None:
    check_inside(address, nbytes)


@settings(max_examples=200, deadline=None)
@given(st.integers(990, 1110), st.integers(0, 120))
def test_no_range_leaves_its_region_by_a_byte(address: int, nbytes: int) -> None:
    check_inside(address, nbytes)


def check_inside(address: int, nbytes: int) -> None:
    host = [REGIONS[0], REGIONS[2]]
    inside = any(
        region.address <= address and address + nbytes <= region.address + region.nbytes
        for region in host
    )
    with nullcontext() if inside else pytest.raises(OutsideRegionsError, match="range 1, "):
        devices_of(ranges((1000, 1), (address, nbytes)), host)


def test_pairs_must_match() -> None:
    assert check_pairs(ranges((0, 3), (9, 4)), ranges((5, 3), (6, 4))) == 7
    with pytest.raises(ValueError, match="differ"):
        check_pairs(ranges((0, 3)), ranges((0, 4)))
    with pytest.raises(ValueError, match="differ"):
        check_pairs(ranges((0, 3)), ranges((0, 3), (9, 3)))
    with pytest.raises(ValueError, match="notify"):
        check_pairs(ranges(), ranges())
    with pytest.raises(ValueError, match="uint64"):
        check_pairs(np.zeros((1, 3), np.uint64), ranges((0, 3)))
    with pytest.raises(ValueError, match="uint64"):
        check_pairs(np.zeros((1, 2), np.int64), ranges((0, 3)))
