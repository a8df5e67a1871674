"""The cost model: the formula, and learning it online."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.scheduler import cost_model
from penstock_runtime.scheduler.cost_model import DEFAULT_COST, Chunk, Cost, CostModel
from penstock_runtime.scheduler.nonnegative import solve_nonnegative

# From a small model on a laptop to a large one on eight GPUs: c is worth 10 to 3,000 tokens, and
# attention equals the linear layers at a context of 2,000 to 150,000.
COSTS = st.builds(
    lambda b, c, gamma, a: Cost(c=b * c, gamma=b * gamma, b=b, a=b * a),
    b=st.floats(1e-6, 1e-3),
    c=st.floats(10, 3000),
    gamma=st.floats(0, 1e-3),
    a=st.floats(3e-6, 3e-4),
)


def steps(seed: int, count: int) -> list[list[Chunk]]:
    """Steps as a prefill group meets them: all sizes, many depths, sometimes several chunks."""
    generator = random.Random(seed)
    return [
        [
            Chunk(
                generator.choice([0, generator.randrange(100_000)]), generator.randrange(16, 8192)
            )
            for _ in range(generator.choice([1, 1, 1, 3]))
        ]
        for _ in range(count)
    ]


def worst_error(model: CostModel, true: Cost, seed: int = 99) -> float:
    return max(abs(model.cost.step(s) / true.step(s) - 1) for s in steps(seed, 30))


def test_formula() -> None:
    cost = Cost(c=1.0, gamma=0.1, b=2.0, a=0.5)
    assert cost.chunk(10, 3) == pytest.approx(1 + 0.1 * 10 + 2 * 3 + 0.5 * (2 * 10 * 3 + 9))
    assert cost.step([Chunk(10, 3), Chunk(0, 2)]) == pytest.approx(
        cost.chunk(10, 3) + cost.chunk(0, 2) - 1
    )
    assert cost.step([]) == 0.0
    assert cost.work(3, 7) + cost.work(7, 20) == pytest.approx(cost.work(3, 20))


@given(COSTS, st.integers(0, 1_000_000), st.integers(1, 100_000))
def test_tokens_within_inverts_the_formula(cost: Cost, start: int, length: int) -> None:
    seconds = cost.chunk(start, length) - cost.c
    # Reading the prefix may be most of the time: what is left of it then has lost some digits.
    assert cost.tokens_within(start, seconds) == pytest.approx(length, rel=1e-6)


def test_tokens_within_at_its_borders() -> None:
    assert Cost(1, 0.1, 2, 0.5).tokens_within(10, 0.9) == 0
    assert Cost(1, 0, 0, 0).tokens_within(10, 1) == math.inf
    assert Cost(1, 0, 1, 1).tokens_within(10, math.inf) == math.inf
    assert Cost(1, 0, 2, 0).tokens_within(10, 4) == 2


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_impossible_coefficients_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not negative"):
        Cost(c=0, gamma=0, b=value, a=0)


# Here and below always the same draws: what is bounded is chance, of steps and of noise, and one
# in some thousand is beyond any bound.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(COSTS, st.integers(0, 1000))
def test_known_coefficients_are_recovered_under_noise(true: Cost, seed: int) -> None:
    model = CostModel()
    generator = random.Random(seed)
    for step in steps(seed, 300):
        model.observe(step, true.step(step) * generator.lognormvariate(0, 0.03))
    # The worst of 30 steps: a tail, and single draws reach 0.2.
    assert worst_error(model, true) < 0.25
    assert 0.01 < model.error < 0.06


@settings(max_examples=30, deadline=None, derandomize=True)
@given(COSTS, st.integers(0, 1000))
def test_without_noise_a_few_steps_suffice(true: Cost, seed: int) -> None:
    model = CostModel()
    for step in steps(seed, 60):
        model.observe(step, true.step(step))
    assert worst_error(model, true) < 0.35


@pytest.mark.parametrize("factor", [0.5, 1.3, 2.0, 5.0])
def test_a_lasting_change_is_followed(factor: float) -> None:
    true = Cost(1e-2, 2e-8, 2e-5, 5e-10)
    changed = Cost(*(factor * v for v in (true.c, true.gamma, true.b, true.a)))
    model = CostModel()
    for step in steps(1, 200):
        model.observe(step, true.step(step))
    for step in steps(2, 400):
        model.observe(step, changed.step(step))
    assert worst_error(model, changed) < 0.1


@pytest.mark.parametrize("pause", [10.0, 1e4])
def test_a_paused_process_moves_the_model_by_little(pause: float) -> None:
    true = Cost(1e-2, 2e-8, 2e-5, 5e-10)
    model = CostModel()
    for i, step in enumerate(steps(1, 300)):
        model.observe(step, true.step(step) * (pause if i % 50 == 49 else 1))
    assert worst_error(model, true) < 0.1


def test_what_is_not_seen_any_more_is_remembered() -> None:
    true = Cost(1e-2, 2e-8, 2e-5, 5e-10)
    model = CostModel()
    for step in steps(1, 200):
        model.observe(step, true.step(step))
    generator = random.Random(5)
    for _ in range(5000):
        short = [Chunk(0, generator.randrange(100, 300))]
        model.observe(short, true.step(short) * generator.lognormvariate(0, 0.05))
    assert model.cost.chunk(100_000, 4096) == pytest.approx(true.chunk(100_000, 4096), rel=0.35)


@pytest.mark.parametrize("seed", range(16))
def test_decoding_at_another_speed_tells_nothing_of_prompts(seed: int) -> None:
    # Reading memory changes its speed at times, mostly while decoding, arithmetic does not; and
    # a step is not linear in its tokens, so that many steps' errors have one sign.
    generator = random.Random(seed)
    model = CostModel()
    reading, other = 5e-3, 9e-3

    def compute(chunks: list[Chunk]) -> float:
        nonlocal reading, other
        if generator.random() < 0.01:
            reading, other = other, reading
        tokens = sum(chunk.length for chunk in chunks)
        context = sum(chunk.start for chunk in chunks)
        seconds = math.hypot(reading, 1e-3 * tokens) + 1e-3 + 1e-4 * reading * context
        model.observe(chunks, seconds * generator.lognormvariate(0, 0.01))
        return seconds

    for _ in range(3):
        for start in range(0, 8192, 512):
            compute([Chunk(start, 512)])
        for batch in (1, 8, 32):
            for token in range(64):
                compute([Chunk(512 + token, 1)] * batch)
        streams = [Chunk(544, 1)] * 8
        for prompt in range(5):
            start = 0
            while start < 2048:
                wanted = model.cost.tokens_within(start, 0.05)
                length = int(min(max(32, wanted), 504, 2048 - start))
                seconds = compute([*streams, Chunk(start, length)])
                assert seconds < 0.12, f"{length} tokens of prompt {prompt} at {start}"
                start += length


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**6), st.integers(0, 10**5), st.floats(0, 1e6) | st.just(math.nan)
        ),
        max_size=60,
    )
)
def test_whatever_is_measured_no_time_is_negative(
    measured: list[tuple[int, int, float]],
) -> None:
    model = CostModel()
    for start, length, seconds in measured:
        model.observe([Chunk(start, length)], seconds)
        cost = model.cost  # its constructor refuses negative coefficients
        assert cost.chunk(1000, 100) >= 0
        assert math.isfinite(model.error)


def test_the_first_steps_set_the_size() -> None:
    model = CostModel()
    model.observe([Chunk(0, 512)], 90.0)  # the first one loaded something
    model.observe([Chunk(0, 512)], 3.0)
    assert model.cost.chunk(0, 512) == pytest.approx(3.0)
    ratio = DEFAULT_COST.chunk(0, 1024) / DEFAULT_COST.chunk(0, 512)
    assert model.cost.chunk(0, 1024) == pytest.approx(3.0 * ratio, rel=0.05)


def test_a_seed_is_trusted_at_first() -> None:
    seed = Cost(1e-2, 0.0, 2e-5, 5e-10)
    model = CostModel(seed)
    assert model.cost == seed
    model.observe([Chunk(0, 512)], 1.05 * seed.chunk(0, 512))
    assert model.cost.chunk(50_000, 2048) == pytest.approx(seed.chunk(50_000, 2048), rel=0.1)


def test_empty_and_impossible_measurements_are_ignored() -> None:
    model = CostModel()
    for seconds in (0.0, -1.0, math.nan, math.inf):
        model.observe([Chunk(0, 10)], seconds)
    model.observe([], 1.0)
    assert model.samples == 0
    assert model.cost == DEFAULT_COST


def test_the_wire_carries_coefficients_and_error() -> None:
    model = CostModel()
    for step in steps(3, 20):
        model.observe(step, DEFAULT_COST.step(step))
    sent = model.export()
    assert Cost.from_wire(sent) == model.cost
    assert sent.error == model.error


def test_a_forgetting_factor_is_a_share() -> None:
    with pytest.raises(ValueError, match="forgetting"):
        CostModel(forgetting=1.1)


# --- the solver ----------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_solution_is_the_least_nonnegative_one(seed: int) -> None:
    """Karush-Kuhn-Tucker: no unknown can be improved, alone or together (it is convex)."""
    generator = random.Random(seed)
    rows = [[generator.gauss(0, 1) for _ in range(4)] for _ in range(6)]
    matrix = [
        [sum(r[i] * r[j] for r in rows) + (1e-3 if i == j else 0) for j in range(4)]
        for i in range(4)
    ]
    vector = [generator.gauss(0, 1) for _ in range(4)]
    solution = solve_nonnegative(matrix, vector)
    for i in range(4):
        gradient = sum(matrix[i][j] * solution[j] for j in range(4)) - vector[i]
        assert solution[i] >= 0
        assert gradient >= -1e-6
        assert abs(gradient * solution[i]) < 1e-6


@given(
    rows=st.lists(st.tuples(*[st.floats(0.01, 1.0)] * 4), min_size=4, max_size=20),
    wanted=st.tuples(*[st.floats(-1.0, 2.0)] * 4),
)
def test_the_short_way_finds_what_the_long_way_does(
    rows: list[tuple[float, ...]], wanted: tuple[float, ...]
) -> None:
    matrix = [
        [sum(r[i] * r[j] for r in rows) + (0.1 if i == j else 0.0) for j in range(4)]
        for i in range(4)
    ]
    vector = [sum(m * w for m, w in zip(line, wanted, strict=True)) for line in matrix]
    short = cost_model._solve_positive(matrix, vector)
    long = solve_nonnegative(matrix, vector)
    if min(wanted) > 1e-6:
        assert short == pytest.approx(list(wanted), rel=1e-6)
    if min(wanted) < -1e-6:
        assert short is None
    if short is not None:
        assert short == pytest.approx(long, rel=1e-6, abs=1e-9)


def test_a_singular_system_is_left_to_the_long_way() -> None:
    row = [1.0, 2.0, 3.0, 4.0]
    matrix = [[x * y for y in row] for x in row]
    assert cost_model._solve_positive(matrix, row) is None
