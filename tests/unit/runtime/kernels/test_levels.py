"""The kernels give the same bits at every level of instructions that this processor has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_runtime.kernels.library import usable_levels

from .built import built_kernels
from .levels import differences, results

if TYPE_CHECKING:
    from pathlib import Path


def test_all_levels_give_the_same_bits(tmp_path: Path) -> None:
    built_kernels()
    first, *others = [results(level, tmp_path) for level in usable_levels()]
    assert len(first) == 50
    assert not any(differences(first, other) for other in others)
