from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_router.prefix_index import PrefixIndex


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def block(n: int) -> bytes:
    return n.to_bytes(16, "little")


def blocks(*numbers: int) -> list[bytes]:
    return [block(n) for n in numbers]


def test_the_longest_prefix_of_every_worker() -> None:
    index = PrefixIndex(Clock())
    index.replace("a", blocks(1, 2, 3), 10)
    index.replace("b", blocks(1, 3), 10)
    index.replace("c", blocks(2, 3), 10)
    assert index.longest_prefix(blocks(1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.longest_prefix(blocks(9)) == {}
    assert index.longest_prefix([]) == {}


def test_capacity_bounds_what_a_worker_can_put_in() -> None:
    index = PrefixIndex(Clock())
    assert not index.replace("a", blocks(*range(100)), 10)
    assert len(index) == index.blocks_of("a") == 10
    assert index.update("a", [], blocks(*range(5)), 10)
    assert index.update("a", blocks(200), [], 10)


def test_predictions_count_for_a_while() -> None:
    clock = Clock()
    index = PrefixIndex(clock, predicted_seconds=4.0)
    index.predict("a", blocks(1, 2))
    assert index.longest_prefix(blocks(1, 2, 3)) == {"a": 2}
    clock.now = 3.9
    assert index.longest_prefix(blocks(1)) == {"a": 1}
    clock.now = 8.1
    assert index.longest_prefix(blocks(1)) == {}
    assert len(index) == 0


def test_predictions_are_bounded_and_end_with_their_worker() -> None:
    index = PrefixIndex(Clock(), max_predicted=10)
    for n in range(0, 100, 10):
        index.predict("a", blocks(*range(n, n + 10)))
    known = [n for n in range(100) if index.longest_prefix(blocks(n))]
    assert len(known) <= 20
    index.drop("a")
    index.predict("b", blocks(500))
    assert index.longest_prefix(blocks(99)) == {}
    assert index.longest_prefix(blocks(500)) == {"b": 1}


EVENT = st.tuples(
    st.sampled_from("abcd"),
    st.sampled_from(["update", "replace", "drop"]),
    st.sets(st.integers(0, 12), max_size=6),
    st.sets(st.integers(0, 12), max_size=6),
)


@settings(max_examples=100)
@given(st.lists(EVENT, max_size=20), st.lists(st.integers(0, 12), max_size=8))
def test_it_agrees_with_plain_sets(
    events: list[tuple[str, str, set[int], set[int]]], prompt: list[int]
) -> None:
    index = PrefixIndex(Clock())
    model: dict[str, set[int]] = {}
    for worker, kind, stored, evicted in events:
        held = model.setdefault(worker, set())
        if kind == "drop":
            index.drop(worker)
            model[worker] = set()
        elif kind == "replace":
            index.replace(worker, blocks(*stored), 100)
            model[worker] = set(stored)
        else:
            index.update(worker, blocks(*stored), blocks(*evicted), 100)
            model[worker] = (held - evicted) | stored
    expected = {}
    for worker, held in model.items():
        depth = next((at for at, n in enumerate(prompt) if n not in held), len(prompt))
        if depth:
            expected[worker] = depth
    assert index.longest_prefix(blocks(*prompt)) == expected
    assert len(index) == len(set().union(*model.values()))
    assert all(index.blocks_of(worker) == len(held) for worker, held in model.items())
