"""The model of decode workers, against a plain count of every token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.simulator.decode import DecodeModel, DecodeWorker, Sequence, TokenGaps

MODEL = DecodeModel(step=0.01, request=1e-3, token=1e-6, max_batch=4, kv_tokens=1000)


def plain(model: DecodeModel, sequences: list[Sequence]) -> tuple[dict[int, float], list[float]]:
    """Return the times of first tokens and all gaps, by keeping every request's tokens."""
    waiting = list(sequences)
    running: list[list[int]] = []  # [number, tokens now, tokens left, tokens at the end]
    last: dict[int, float] = {}
    first: dict[int, float] = {}
    gaps: list[float] = []
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, waiting[0].ready)
        while waiting and waiting[0].ready <= now and len(running) < model.max_batch:
            new = waiting[0]
            if sum(r[3] for r in running) + new.tokens > model.kv_tokens:
                break
            waiting.pop(0)
            running.append([new.number, new.input_tokens, new.output_tokens, new.tokens])
        now += model.seconds(len(running), sum(r[1] for r in running))
        for request in running:
            if request[0] in last:
                gaps.append(now - last[request[0]])
            first.setdefault(request[0], now)
            last[request[0]] = now
            request[1] += 1
            request[2] -= 1
        running = [r for r in running if r[2]]
    return first, gaps


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.3), st.integers(1, 300), st.integers(1, 30)),
        min_size=1,
        max_size=15,
    )
)
def test_steps_give_the_tokens_that_a_plain_count_gives(
    drawn: list[tuple[float, int, int]],
) -> None:
    sequences = [
        Sequence(ready, number, prompt, answer)
        for number, (ready, prompt, answer) in enumerate(sorted(drawn))
    ]
    worker = DecodeWorker(MODEL)
    for sequence in sequences:
        worker.add(sequence)
    worker.advance()
    first, gaps = plain(MODEL, sequences)
    assert worker.first_tokens == pytest.approx(first)
    assert worker.load == 0
    gaps.sort()
    for percent in (1, 50, 99, 100):
        index = max(0, -(-percent * len(gaps) // 100) - 1)
        expected = gaps[index] if gaps else 0.0
        assert worker.gaps.percentile(percent) == pytest.approx(expected, abs=2e-6)


def test_percentiles_count_every_token() -> None:
    gaps = TokenGaps()
    gaps.add(0.01, 98)
    gaps.add(0.5, 2)
    other = TokenGaps()
    other.add(0.02, 100)
    gaps.merge(other)
    assert gaps.percentile(49) == 0.01
    assert gaps.percentile(50) == 0.02
    assert gaps.percentile(99) == 0.02
    assert gaps.percentile(99.5) == 0.5
    assert TokenGaps().percentile(99) == 0.0


def test_what_can_never_be_held_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        DecodeWorker(MODEL).add(Sequence(0.0, 0, 999, 2))
    with pytest.raises(ValueError, match="take time"):
        DecodeModel(step=0.0)
