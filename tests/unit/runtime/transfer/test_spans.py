"""Sets of token ranges agree with sets of tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.transfer.spans import Spans

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20)


@settings(max_examples=150, deadline=None)
@given(ranges)
def test_spans_are_sets(added: list[tuple[int, int]]) -> None:
    spans, tokens = Spans(), set[int]()
    for start, end in added:
        new = set(range(start, end))
        assert spans.add(start, end) == (bool(new) and not new & tokens)
        if not new & tokens:
            tokens |= new
        for origin in range(32):
            missing = next(t for t in range(origin, 64) if t not in tokens)
            assert spans.reach(origin) == missing


def test_neighbours_are_joined() -> None:
    spans = Spans()
    for start in (0, 8, 4):
        assert spans.add(start, start + 4)
    assert spans._starts == [0]
    assert spans.reach(0) == 12
