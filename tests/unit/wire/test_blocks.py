"""Block hashes: equal exactly when tokens, positions and salt are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_wire.blocks import HASH_BYTES, block_hash, block_hashes, root_hash, split_hashes
from penstock_wire.messages import pack_tokens

TOKENS = st.lists(st.integers(0, 1000), max_size=40)


@given(tokens=TOKENS, more=TOKENS, page=st.integers(1, 8))
def test_a_longer_sequence_keeps_its_prefix(tokens: list[int], more: list[int], page: int) -> None:
    root = root_hash("model")
    short = block_hashes(root, pack_tokens(tokens), page)
    long = block_hashes(root, pack_tokens(tokens + more), page)
    assert len(short) == len(tokens) // page
    assert long[: len(short)] == short
    assert len(set(long)) == len(long)


@given(tokens=st.lists(st.integers(0, 1000), min_size=4, max_size=4), at=st.integers(0, 3))
def test_any_token_changes_its_block_and_all_behind(tokens: list[int], at: int) -> None:
    root = root_hash("model")
    changed = [t + (i == at) for i, t in enumerate(tokens)]
    one, other = (block_hashes(root, pack_tokens(t), 2) for t in (tokens, changed))
    assert [a == b for a, b in zip(one, other, strict=True)] == [at >= 2, False]


def test_roots_differ_by_each_part_and_do_not_run_together() -> None:
    roots = {
        root_hash("m"),
        root_hash("m", b"s"),
        root_hash("m", adapter="s"),
        root_hash("ms"),
        root_hash("", b"m"),
    }
    assert len(roots) == 5


def test_hashes_travel_joined() -> None:
    hashes = [block_hash(root_hash("m"), bytes([i] * 8)) for i in range(3)]
    assert list(split_hashes(b"".join(hashes))) == hashes
    with pytest.raises(ValueError, match="whole number"):
        list(split_hashes(b"x" * (HASH_BYTES + 1)))
