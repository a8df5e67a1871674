from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_router.openai.stop_strings import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += matcher.feed(piece)
        if matcher.stopped:
            return out, True
    return out + matcher.flush(), False


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["###", "stop"])
    assert matcher.feed("a#") == "a"
    assert matcher.feed("#b") == "##b"
    assert matcher.feed("st") == ""
    assert matcher.feed("op!") == ""
    assert matcher.stopped


def test_the_stop_that_ends_first_wins() -> None:
    assert run(["abc", "b"], ["abc"]) == ("a", True)
    assert run(["bc", "abc"], ["xabc"]) == ("x", True)


def test_without_stops_everything_passes() -> None:
    assert run([], ["a", "b"]) == ("ab", False)


TEXT = st.text("ab#", max_size=24)


@settings(max_examples=200)
@given(st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=3), TEXT, st.data())
def test_the_result_does_not_depend_on_the_cuts(
    stops: list[str], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    out, stopped = run(stops, pieces)
    assert (out, stopped) == run(stops, list(text))
    assert text.startswith(out)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or out == text
    assert not any(stop in out for stop in stops)
