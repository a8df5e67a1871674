"""What recurs does so at the same moments."""

from __future__ import annotations

import asyncio

import pytest

from penstock_wire.rhythm import until_next


async def test_sleepers_meet_at_multiples_of_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "time", lambda: 12.75)
        assert [until_next(seconds) for seconds in (0.1, 0.5, 1.0)] == pytest.approx(
            [0.05, 0.25, 0.25]
        )
        assert until_next(0.25) == 0.25, "not at once"
