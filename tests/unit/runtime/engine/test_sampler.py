"""The sampler against its definition: exact filters, exact distributions, no neighbours."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from dataclasses import replace
from itertools import accumulate, islice, repeat
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.engine.sampler import BrokenLogits, SamplingRow, sample, uniform
from penstock_wire.messages import Sampling

torch.set_num_threads(1)

CHI2_999_BY_DEGREES = {4: 18.5, 7: 24.3, 15: 37.7, 99: 148.2}
"""99.9 % points of the chi-square distribution."""


def row(
    prompt: list[int] | None = None, output: list[int] | None = None, **options: Any
) -> SamplingRow:
    prompt, output = prompt or [], output or []
    sampling = Sampling(**({"seed": 1} | options))
    return SamplingRow(sampling, array("i", prompt + output), len(prompt), len(output))


def choose(logits: list[float] | torch.Tensor, one: SamplingRow) -> int:
    return sample(torch.as_tensor(logits)[None], [one])[0].id


def chi_square(counts: Counter[int], probabilities: list[float]) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities) if p)


# --- the random number ---------------------------------------------------------------------------


def test_uniform_is_the_same_for_ever() -> None:
    # These values are part of the protocol: a moved request must go on with the same tokens.
    values = [uniform(1, 0), uniform(1, 1), uniform(-5, 2**40)]
    assert values == [0.36818951565166946, 0.9435642308648544, 0.24967462167385568]
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


@pytest.mark.parametrize("by", ["position", "seed", "both"])
def test_uniform_is_uniform_and_independent(by: str) -> None:
    n = 20_000
    seeds = repeat(7) if by == "position" else range(n)
    positions = repeat(7) if by == "seed" else range(n)
    values = [
        uniform(seed, position) for seed, position in islice(zip(seeds, positions, strict=False), n)
    ]
    assert all(0 <= v < 1 for v in values)
    bins = Counter(int(v * 100) for v in values)
    assert chi_square(bins, [0.01] * 100) < CHI2_999_BY_DEGREES[99]
    pairs = Counter(
        4 * int(a * 4) + int(b * 4) for a, b in zip(values[::2], values[1::2], strict=True)
    )
    assert chi_square(pairs, [1 / 16] * 16) < CHI2_999_BY_DEGREES[15]


# --- distributions -------------------------------------------------------------------------------


def draws(logits: list[float], count: int, **options: Any) -> Counter[int]:
    rows = [row(**({"seed": seed} | options)) for seed in range(count)]
    return Counter(t.id for t in sample(torch.tensor([logits] * count), rows))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_softmax_s_probabilities(temperature: float) -> None:
    logits = [0.0, 1.0, -2.0, 0.5, 2.0, -1.0, 0.2, 0.3]
    weights = [math.exp(x / temperature) for x in logits]
    probabilities = [w / sum(weights) for w in weights]
    counts = draws(logits, 4000, temperature=temperature)
    assert chi_square(counts, probabilities) < CHI2_999_BY_DEGREES[7]


def test_what_the_filters_leave_is_drawn_in_proportion() -> None:
    probabilities = [0.3, 0.25, 0.2, 0.15, 0.1]
    logits = [math.log(p) for p in probabilities]
    counts = draws(logits, 3000, top_k=4, top_p=0.8)
    # Of 0.9 (top 4), 0.8 are 0.72: three tokens hold 0.75.
    kept = [p / 0.75 for p in probabilities[:3]] + [0, 0]
    assert set(counts) == {0, 1, 2}
    assert chi_square(counts, kept) < CHI2_999_BY_DEGREES[4]


def test_positions_of_one_request_are_drawn_independently() -> None:
    logits = [0.0, 0.0, 0.0, 0.0, 0.0]
    rows = [row(output=[0] * position, seed=3) for position in range(3000)]
    counts = Counter(t.id for t in sample(torch.tensor([logits] * 3000), rows))
    assert chi_square(counts, [0.2] * 5) < CHI2_999_BY_DEGREES[4]


# --- against the definition ----------------------------------------------------------------------


def reference(logits: list[float], one: SamplingRow) -> int:
    """The module's text, word by word, in plain Python."""
    s = one.sampling
    position = len(one.tokens) - one.prompt_length
    values = adjusted(logits, one)
    if s.temperature == 0:
        return values.index(max(values))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = order[: s.top_k] if s.top_k else order
    weights = {i: math.exp((values[i] - max(values)) / s.temperature) for i in kept}
    kept = [i for i in kept if weights[i] >= s.min_p]
    if s.top_p < 1:
        total = sum(weights[i] for i in kept)
        nucleus: list[int] = []
        while not nucleus or sum(weights[i] for i in nucleus) < s.top_p * total:
            nucleus.append(kept[len(nucleus)])
        kept = nucleus
    target = uniform(s.seed, position) * sum(weights[i] for i in kept)
    below = accumulate(weights[i] for i in sorted(kept))
    return next(i for i, weight in zip(sorted(kept), below, strict=True) if weight > target)


def adjusted(logits: list[float], one: SamplingRow) -> list[float]:
    s = one.sampling
    values = list(logits)
    output = list(one.tokens[one.prompt_length :])
    for token in set(one.tokens):
        x = values[token]
        values[token] = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
    for token, count in Counter(output).items():
        values[token] -= s.frequency_penalty * count + s.presence_penalty
    for token in range(len(values)):
        values[token] += s.logit_bias.get(token, 0.0)
        if len(output) < s.min_tokens and token in s.stop_token_ids:
            values[token] = -math.inf
    return values


VOCABULARY = 12
OPTIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**63),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_p": st.sampled_from([0.1, 0.53, 0.9, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 7, 100]),
        "min_p": st.sampled_from([0.0, 0.04, 0.31]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -0.4]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -1.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "logit_bias": st.sampled_from([{}, {2: 1.5, 7: -100.0}, {99: 5.0, -1: 5.0, 0: 0.25}]),
        "min_tokens": st.sampled_from([0, 2]),
        "stop_token_ids": st.sampled_from([(), (1, 4), (4, 999)]),
    }
)
# Sixteenths: ties are frequent, and sums that decide a filter are not within rounding of it.
LOGITS = st.lists(
    st.integers(-64, 64).map(lambda n: n / 16), min_size=VOCABULARY, max_size=VOCABULARY
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


@settings(max_examples=300, deadline=None)
@given(logits=LOGITS, prompt=TOKENS, output=TOKENS, options=OPTIONS)
def test_every_choice_is_the_definition_s(
    logits: list[float], prompt: list[int], output: list[int], options: dict[str, Any]
) -> None:
    one = row(prompt, output, **options)
    choice = reference(logits, one)
    assert choose(logits, one) == choice
    if output:
        # The last token is not among the others yet, or has come to them in between.
        before = one.tokens[:-1]
        for tokens in (before, one.tokens, one.tokens + array("i", [5])):
            assert choose(logits, replace(one, tokens=tokens, latest=output[-1])) == choice


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), options=st.lists(OPTIONS, min_size=2, max_size=6))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, options: list[dict[str, Any]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(options), 3001, generator=generator).to(torch.bfloat16)
    rows = [row([1, 2, 3], [4] * (i % 3), logprobs=i % 4, **o) for i, o in enumerate(options)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    # Bitwise: log-probabilities included.
    assert together == alone == backwards


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_nucleus_of_a_large_vocabulary_is_the_sorted_one(seed: int) -> None:
    generator = random.Random(seed)
    logits = torch.tensor([generator.gauss(0, generator.choice([1, 4])) for _ in range(5000)])
    top_p = generator.choice([0.01, 0.5, 0.9, 0.999])
    weights = torch.softmax(logits.double(), 0)
    ordered, ids = weights.sort(descending=True, stable=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1
    kept = set(ids[:size].tolist())
    rows = [row(seed=n, top_p=top_p) for n in range(20)]
    drawn = {t.id for t in sample(logits.expand(20, -1), rows)}
    assert drawn <= kept


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_greedy_takes_the_largest_and_of_equals_the_first(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 40_000, dtype=dtype)
    logits[1, [77, 500, 39_999]] = 2.0
    logits[2] = -1.0
    logits[2, 39_000] = -0.5
    rows = [row(temperature=0) for _ in range(3)]
    assert [t.id for t in sample(logits, rows)] == [0, 77, 39_000]
    # The same by the long way: a bias that changes nothing of importance.
    rows = [row(temperature=0, logit_bias={5: -1.0}) for _ in range(3)]
    assert [t.id for t in sample(logits, rows)] == [0, 77, 39_000]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert choose([1.0, 3.0, 2.0], row(temperature=1e-300)) == 1


def test_min_tokens_rules_stop_tokens_out() -> None:
    stop: dict[str, Any] = {"temperature": 0.0, "stop_token_ids": (2,), "min_tokens": 2}
    assert choose([0.0, 1.0, 9.0], row(output=[0], **stop)) == 1
    assert choose([0.0, 1.0, 9.0], row(output=[0, 0], **stop)) == 2


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    logits = [1.0, -math.inf, 0.0, -math.inf]
    counts = draws(logits, 500)
    assert set(counts) == {0, 2}


# --- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_s_own_logits() -> None:
    logits = [0.5, 2.0, 1.0, 2.0]
    exact = torch.tensor(logits, dtype=torch.float64).log_softmax(0).tolist()
    one = row(temperature=0.3, top_k=1, logit_bias={0: 100.0}, logprobs=3)
    (token,) = sample(torch.tensor([logits]), [one])
    assert token.id == 0
    assert token.logprob == pytest.approx(exact[0])
    assert [i for i, _ in token.top] == [1, 3, 2]
    assert [x for _, x in token.top] == pytest.approx([exact[1], exact[3], exact[2]])


def test_logprobs_are_given_as_asked() -> None:
    logits = torch.zeros(3, 4)
    rows = [row(logprobs=None), row(logprobs=0), row(logprobs=20)]
    none, chosen, all_four = sample(logits, rows)
    assert (none.logprob, none.top) == (None, ())
    assert chosen.logprob == pytest.approx(-math.log(4))
    assert chosen.top == ()
    assert [i for i, _ in all_four.top] == [0, 1, 2, 3]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_named(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(BrokenLogits, match=r"rows \[1\]"):
        sample(logits, [row(), row(), row()])


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": (0, 1, 2), "min_tokens": 1},
        {"logit_bias": {0: math.inf}},
        {"logit_bias": {0: math.nan}},
        {"logit_bias": {0: -math.inf, 1: -math.inf, 2: -math.inf}},
        {"repetition_penalty": 1e-320},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_options_end_nobody_s_step(options: dict[str, Any], temperature: float) -> None:
    odd = row([0, 1, 2], temperature=temperature, top_k=1, **options)
    tokens = sample(torch.tensor([[1.0, 3.0, 2.0]] * 2), [odd, row(temperature=0)])
    assert [t.id for t in tokens] == [1, 1]


def test_rows_and_logits_must_be_as_many() -> None:
    assert sample(torch.zeros(0, 4), []) == []
    with pytest.raises(ValueError, match="1 rows of logits for 2"):
        sample(torch.zeros(1, 4), [row(), row()])


def test_logits_are_not_changed() -> None:
    logits = torch.zeros(1, 4, dtype=torch.float64)
    sample(logits, [row([1], [2], repetition_penalty=2, presence_penalty=1, logit_bias={0: 1})])
    assert not logits.any()
