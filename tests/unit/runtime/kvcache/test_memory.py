"""Memory for weights and KV: aligned, whole, and in large pages where the machine gives them."""

from __future__ import annotations

import errno
import mmap
import re
from pathlib import Path

import pytest
import torch

from penstock_runtime.errors import ConfigurationError
from penstock_runtime.memory import Arena, large_empty, out_of_memory

MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [0, 1, 1000, 3 * MIB, 9 * MIB + 5])
def test_as_much_as_was_asked_for_and_aligned(dtype, elements):
    memory = large_empty(elements, dtype, 4096)
    assert memory.shape == (elements,)
    assert memory.dtype == dtype
    assert memory.is_contiguous()
    assert memory.data_ptr() % 4096 == 0
    memory.fill_(1)


def test_large_pages_are_asked_for():
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists():
        pytest.skip("this kernel has no large pages")
    memory = large_empty(16 * MIB, torch.float32)
    assert "hg" in flags_of_mapping(memory.data_ptr())


def test_an_arena_hands_out_pieces_one_behind_the_other():
    arena = Arena(8 * MIB)
    first, second = arena.take(100), arena.take(3 * MIB)
    assert first.shape == (100,)
    assert first.data_ptr() % (2 * MIB) == 0
    assert second.data_ptr() == first.data_ptr() + 128
    kept = arena.trim(1000)
    assert kept.data_ptr() == second.data_ptr()
    assert kept.shape == (1000,)
    assert arena.take(1).data_ptr() == kept.data_ptr() + 1024
    assert arena.trim(0).shape == (0,)
    assert arena.take(1).data_ptr() == kept.data_ptr() + 1024


def test_an_arena_takes_more_memory_where_a_piece_does_not_fit():
    arena = Arena(4 * MIB)
    pieces = [
        arena.take(size).fill_(value) for value, size in enumerate((3 * MIB, 3 * MIB, 9 * MIB))
    ]
    assert [piece.shape for piece in pieces] == [(3 * MIB,), (3 * MIB,), (9 * MIB,)]
    assert all(piece.eq(value).all() for value, piece in enumerate(pieces))


def test_a_refusal_of_large_pages_changes_nothing_but_speed(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    memory = large_empty(3 * MIB, torch.float32)
    assert memory.fill_(1).sum() == 3 * MIB


def test_a_lack_of_memory_names_what_it_was_for_and_the_remedy():
    expected = "--kv-memory 8PiB: this machine has not enough memory; lower it"
    with (
        pytest.raises(ConfigurationError, match=expected),
        out_of_memory("--kv-memory 8PiB", "lower it"),
    ):
        large_empty(2**53, torch.uint8)


def test_another_failure_is_no_lack_of_memory():
    with pytest.raises(OSError, match="no such"), out_of_memory("The weights", "lower it"):
        raise OSError(errno.ENOENT, "no such file")


def flags_of_mapping(address: int) -> list[str]:
    """Return the flags of the mapping that holds an address; hg: large pages are wanted."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(border, 16) for border in header.groups())
            inside = low <= address < high
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")
