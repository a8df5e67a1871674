"""What an agent tells its peers: who it is, which memory it opened, and how to reach it.

The transport's own metadata travels inside as opaque bytes. The regions travel beside it, so that
a range outside of the peer's memory is refused here, before anything is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from penstock_runtime.transfer.base import PeerLost, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from penstock_runtime.transfer.base import Ranges

MAX_METADATA_BYTES = 1 << 20
"""A metadata of a few regions takes about 1 KiB."""

_Word = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class _Span(Struct, frozen=True, array_like=True):
    address: _Word
    nbytes: _Word
    device: Annotated[int, Meta(ge=0, lt=1 << 16)] | None


class _Card(Struct, frozen=True, array_like=True):
    name: Annotated[str, Meta(min_length=1, max_length=512)]
    spans: Annotated[tuple[_Span, ...], Meta(max_length=64)]
    endpoint: bytes


_decoder = msgspec.msgpack.Decoder(_Card)


class AgentMetadata:
    """An agent's name, regions and transport endpoint, as its peers know them."""

    __slots__ = ("endpoint", "name", "regions")

    def __init__(self, name: str, regions: Sequence[Region], endpoint: bytes) -> None:
        self.name = name
        self.regions = tuple(regions)
        self.endpoint = endpoint

    def encode(self) -> bytes:
        """Return the bytes that a peer's `connect` takes."""
        spans = tuple(_Span(r.address, r.nbytes, r.device) for r in self.regions)
        return msgspec.msgpack.encode(_Card(self.name, spans, self.endpoint))

    @classmethod
    def decode(cls, data: bytes) -> AgentMetadata:
        """Return the metadata in `data`. Raises PeerLost on anything else."""
        if len(data) > MAX_METADATA_BYTES:
            raise PeerLost(f"agent metadata of {len(data)} bytes is over {MAX_METADATA_BYTES}")
        try:
            card = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PeerLost(f"agent metadata cannot be decoded: {error}") from error
        regions = [Region(span.address, span.nbytes, span.device) for span in card.spans]
        return cls(card.name, regions, card.endpoint)


class OutsideRegionsError(ValueError):
    """A range does not lie inside one of the agent's regions."""


def devices_of(ranges: Ranges, regions: Sequence[Region]) -> tuple[NDArray[np.uint64], bool]:
    """Return the device index of each range, shape (n,), and whether they are device memory.

    Raises OutsideRegionsError for a range that no region contains, ValueError if the ranges are
    partly host and partly device memory, which one operation cannot mix.
    """
    address, nbytes = ranges[:, 0], ranges[:, 1]
    devices = np.zeros(len(ranges), np.uint64)
    found = np.zeros(len(ranges), bool)
    on_device = np.zeros(len(ranges), bool)
    for region in regions:
        start, size = np.uint64(region.address), np.uint64(region.nbytes)
        # Subtractions that cannot wrap: these numbers may come from a peer.
        offset = np.where(address >= start, address - start, size)
        inside = (address >= start) & (offset <= size) & (nbytes <= size - np.minimum(offset, size))
        devices[inside] = region.device or 0
        on_device[inside] = region.device is not None
        found |= inside
    if not found.all():
        first = int(np.argmin(found))
        raise OutsideRegionsError(
            f"range {first}, {int(nbytes[first])} bytes at {int(address[first]):#x}, "
            "is outside of the agent's regions"
        )
    if on_device.any() and not on_device.all():
        raise ValueError("one operation mixes host and device memory")
    return devices, bool(on_device.any())


def check_pairs(local: Ranges, remote: Ranges) -> int:
    """Return how many bytes one operation moves.

    Raises ValueError unless both are (n, 2) arrays of uint64 with n ≥ 1 and equal sizes by pair.
    """
    for ranges in (local, remote):
        if ranges.ndim != 2 or ranges.shape[1] != 2 or ranges.dtype != np.uint64:
            raise ValueError(
                f"ranges have shape {ranges.shape} of {ranges.dtype}, not (n, 2) of uint64"
            )
    if not len(local):
        raise ValueError("an operation without ranges: to say something, use notify")
    if not np.array_equal(local[:, 1], remote[:, 1]):
        raise ValueError("local and remote ranges differ in number or size")
    return int(local[:, 1].sum())
