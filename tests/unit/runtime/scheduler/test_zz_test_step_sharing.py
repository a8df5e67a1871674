"""How a step is shared: budgets, pages, and who goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock_runtime.scheduler.cost_model import Cost
from penstock_runtime.scheduler.step_sharing import Prompt, share

LINEAR = Cost(c=1.0, gamma=0.0, b=1.0, a=0.0)
"""A token takes a second: seconds and tokens can be read off each other."""


def shared(prompts: list[Prompt], seconds: float, tokens: int = 1000) -> dict[int, int]:
    items = share(LINEAR, prompts, 4, seconds, tokens, oldest_share=0.5)
    return {item.key: item.length for item in items}


def test_one_prompt_has_the_step_to_itself() -> None:
    assert shared([Prompt(0, 0, 8, 100)], 20) == {0: 20}


def test_the_shorter_goes_first_and_the_oldest_keeps_its_claim() -> None:
    long, short = Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 8)
    assert shared([long, short], 20) == {1: 8, 0: 12}
    assert shared([long, Prompt(1, 0, 0, 50)], 24) == {1: 12, 0: 12}


def test_a_younger_prompt_of_the_same_length_waits() -> None:
    assert shared([Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 100)], 20) == {0: 20}


def test_several_short_prompts_share_a_step() -> None:
    prompts = [Prompt(0, 0, 0, 100), *(Prompt(k, 0, 0, 3) for k in range(1, 4))]
    assert shared(prompts, 20) == {1: 3, 2: 3, 3: 3, 0: 12}


def test_the_oldest_moves_by_a_page_whatever_it_costs() -> None:
    assert shared([Prompt(0, 0, 0, 100)], 1e-9) == {0: 4}
    assert shared([Prompt(0, 0, 0, 100), Prompt(1, 0, 0, 9)], 1e-9) == {0: 4}


def test_chunks_are_cut_at_pages_or_at_the_end() -> None:
    assert shared([Prompt(0, 0, 4, 31)], 13.9) == {0: 12}
    # A remainder of less than half a page is taken along.
    assert shared([Prompt(0, 0, 4, 31)], 26) == {0: 27}


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 300)), min_size=1, max_size=8),
    seconds=st.floats(0, 500),
    tokens=st.integers(4, 200),
    oldest_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_every_step_keeps_its_limits_and_moves_the_oldest(
    lengths: list[tuple[int, int]], seconds: float, tokens: int, oldest_share: float
) -> None:
    prompts = [Prompt(k, 0, 4 * p, 4 * p + n) for k, (p, n) in enumerate(lengths)]
    items = share(LINEAR, prompts, 4, seconds, tokens, oldest_share)
    taken = {item.key: item for item in items}
    assert sum(item.length for item in items) <= tokens
    # Rounding to the nearest page may exceed the time by half a page for each.
    assert sum(item.length for item in items) <= seconds + 4 + 2 * len(items)
    oldest = taken[0]
    claim = min(seconds * oldest_share, oldest_share * tokens, float(lengths[0][1]))
    assert oldest.length >= min(claim - 2 * len(items) - 4, lengths[0][1])
    for item in items:
        prompt = prompts[item.key]
        assert item.start == prompt.planned
        assert item.length > 0
        assert item.last == (item.start + item.length == prompt.end)
        assert item.last or (item.start + item.length) % 4 == 0


def test_nobody_shares_nothing() -> None:
    assert share(LINEAR, [], 4, 10, 10, 0.5) == []


def test_attention_makes_late_chunks_shorter() -> None:
    cost = Cost(c=1.0, gamma=0.0, b=1.0, a=0.01)
    lengths = [
        share(cost, [Prompt(0, 0, planned, 4000)], 4, 100, 1000, 0.5)[0].length
        for planned in (0, 400, 3000)
    ]
    # Roots of 0.01 x² + (1 + 0.02 L) x = 100: 61.8, 11.0, 1.6, to the nearest page.
    assert lengths == [60, 12, 4]
