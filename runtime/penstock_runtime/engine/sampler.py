"""The sampler: from logits to the next tokens.

What happens to a row of logits, in this order:

1. repetition penalty (Keskar et al., CTRL, 2019): logits of tokens that occurred in prompt or
   output are divided by it if positive, multiplied if negative;
2. frequency and presence penalty as the OpenAI API defines them: minus count · frequency, minus
   presence if count > 0, over output tokens;
3. logit bias is added;
4. stop tokens are ruled out before `min_tokens`; options that leave a row without any token, or
   with an infinite logit, are not applied at all: one request must not end its neighbours' step;
5. temperature 0: the largest logit, the lowest id among equals. Else the softmax at that
   temperature, and of it
6. top_k: the k most likely, lower ids first among equals;
7. min_p: of these the ones with at least min_p times the largest probability;
8. top_p: of these the fewest most likely ones that hold top_p of their sum;
9. inverse transform: the first token, by id, at which the cumulative weight exceeds u · total.

u is a pure function of the seed and the output position, see `uniform`. Every row is computed by
itself, in float64 where there is rounding, so that its result does not depend on its neighbours;
only the largest logits are taken in one go, which is exact. On a GPU rows of which nothing but
4 to 9 is asked are chosen together, see `batch_choice`.

Log-probabilities are those of the model's own logits, before any of this, as vLLM reports them.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock_runtime.engine.batch_choice import Choice, choose_together
from penstock_wire.messages import TokenOut

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from penstock_wire.messages import Sampling

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class BrokenLogits(ValueError):  # noqa: N818 - it names what was found
    """A row of logits has no largest finite value: the model's weights or inputs are broken."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the next token of one sequence depends on besides its logits."""

    sampling: Sampling
    tokens: array[int]
    """Prompt and output so far; read only if there are penalties, and may grow meanwhile."""
    prompt_length: int
    position: int
    """Output position of the token to be chosen."""
    latest: int | None = None
    """The token before it, where `tokens` may not have it yet."""

    @property
    def output(self) -> array[int]:
        """The output before the position."""
        end = self.prompt_length + self.position
        if self.latest is None:
            return self.tokens[self.prompt_length : end]
        return self.tokens[self.prompt_length : end - 1] + array("i", [self.latest])


def sample(
    logits_RV: torch.Tensor, rows: Sequence[SamplingRow], *, together: bool | None = None
) -> list[TokenOut]:
    """Choose the next token of each row.

    Args:
        logits_RV: (rows, vocabulary), of any floating type, on any device; not changed.
        rows: one for each row of the logits.
        together: choose plain rows in one go; None: on CUDA, where it saves time.

    Raises:
        BrokenLogits: in some row not even one logit is finite, or one is NaN.
    """
    if logits_RV.shape[0] != len(rows):
        raise ValueError(f"{logits_RV.shape[0]} rows of logits for {len(rows)} sequences")
    if not rows:
        return []
    chosen = _likeliest(logits_RV)
    plain = _plain(logits_RV, rows) if together or (together is None and logits_RV.is_cuda) else {}
    out: list[TokenOut] = []
    for index, (logits_V, row) in enumerate(zip(logits_RV, rows, strict=True)):
        if _is_plain_greedy(row):
            token = chosen[index]
        elif index in plain:
            token = plain[index]
        else:
            token = _choose(logits_V, row)
        out.append(_with_logprobs(logits_V, row.sampling.logprobs, token))
    return out


def _likeliest(logits_RV: torch.Tensor) -> list[int]:
    """Return the id of each row's largest logit, the lowest among equals. Raises BrokenLogits."""
    largest: list[float]
    chosen: list[int]
    if logits_RV.is_cuda or logits_RV.dtype == torch.bfloat16:
        values, ids = logits_RV.max(dim=-1)
        largest, chosen = values.tolist(), ids.tolist()
    else:
        # torch looks at one element after the other.
        table = logits_RV.numpy()
        chosen = table.argmax(axis=-1).tolist()
        largest = [table.item(row, place) for row, place in enumerate(chosen)]
    broken = [row for row, value in enumerate(largest) if not math.isfinite(value)]
    if broken:
        raise BrokenLogits(f"rows {broken} of the logits have no largest finite value")
    return chosen


def _plain(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> dict[int, int]:
    """Return the tokens of the rows that are drawn from the model's own logits, by row."""
    drawn = [
        index
        for index, row in enumerate(rows)
        if row.sampling.temperature > 0 and not _has_adjustments(row)
    ]
    if not drawn:
        return {}
    choices = [
        Choice(
            temperature=row.sampling.temperature,
            top_k=row.sampling.top_k,
            top_p=row.sampling.top_p,
            min_p=row.sampling.min_p,
            uniform=uniform(row.sampling.seed, row.position),
        )
        for row in (rows[index] for index in drawn)
    ]
    chosen: list[int] = choose_together(logits_RV[drawn], choices).tolist()
    return dict(zip(drawn, chosen, strict=True))


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of one output position: a multiple of 2⁻⁵³.

    The mixing function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014), applied to the seed and, with the outcome, to the position.
    """
    mixed = _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)
    return (mixed >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _has_adjustments(row: SamplingRow) -> bool:
    s = row.sampling
    return bool(
        s.repetition_penalty != 1
        or s.frequency_penalty
        or s.presence_penalty
        or s.logit_bias
        or (s.stop_token_ids and row.position < s.min_tokens)
    )


def _is_plain_greedy(row: SamplingRow) -> bool:
    return row.sampling.temperature == 0 and not _has_adjustments(row)


def _choose(logits_V: torch.Tensor, row: SamplingRow) -> int:
    sampling = row.sampling
    logits = _adjust(logits_V, row) if _has_adjustments(row) else logits_V
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The ids, rising, that the entries of `logits` and `weights` belong to; None: all of them.
    ids: torch.Tensor | None = None
    if 0 < sampling.top_k < len(logits):
        ids = _largest(logits, sampling.top_k).sort().values
        logits = logits[ids]
    logits = logits.double()
    weights = torch.exp((logits - logits.max()) / sampling.temperature)
    if sampling.min_p or sampling.top_p < 1:
        kept = _filter(weights, sampling)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    index = _invert(weights, uniform(sampling.seed, row.position))
    return index if ids is None else int(ids[index])


# --- what changes the logits --------------------------------------------------------------------


def _adjust(logits_V: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Return a copy with penalties, bias and the ban of stop tokens, in float64."""
    sampling = row.sampling
    logits = logits_V.to(torch.float64, copy=True)
    if sampling.repetition_penalty != 1:
        seen = _ids({*row.tokens[: row.prompt_length], *row.output}, logits)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.position:
        output = _ids(row.output, logits)
        seen, counts = torch.unique(output, return_counts=True)
        logits[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if sampling.logit_bias:
        biased = _ids(sampling.logit_bias, logits)
        amounts = [sampling.logit_bias[token] for token in biased.tolist()]
        logits[biased] += torch.tensor(amounts, dtype=logits.dtype, device=logits.device)
    if row.position < sampling.min_tokens:
        logits[_ids(sampling.stop_token_ids, logits)] = -math.inf
    return logits if bool(torch.isfinite(logits.max())) else logits_V.double()


def _ids(tokens: Collection[int], logits: torch.Tensor) -> torch.Tensor:
    """Return those token ids that are in the vocabulary; a client may name any."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    return ids[(ids >= 0) & (ids < len(logits))].to(logits.device)


# --- what remains of the distribution -----------------------------------------------------------


def _filter(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the rising indices of the weights that min_p and top_p leave; the largest is 1."""
    kept = torch.nonzero(weights >= sampling.min_p).flatten()
    if sampling.top_p < 1:
        kept = kept[_nucleus(weights[kept], sampling.top_p)]
    return kept


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest, largest first, lower indices first among equals."""
    least = values.topk(k).values[-1]
    candidates = torch.nonzero(values >= least).flatten()
    order = values[candidates].sort(descending=True, stable=True).indices
    return candidates[order[:k]]


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the rising indices of the fewest largest weights that hold top_p of the sum."""
    total = weights.sum()
    # All weights below this hold less than 1 - top_p together, so the nucleus ends before them:
    # they need not be sorted. The half is for rounding.
    bound = 0.5 * (1 - top_p) * total / len(weights)
    candidates = torch.nonzero(weights >= bound).flatten()
    ordered, order = weights[candidates].sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = int((before < top_p * total).sum())
    return candidates[order[: max(1, kept)]].sort().values


def _invert(weights: torch.Tensor, u: float) -> int:
    """Return the first index at which the cumulative weight exceeds u · total."""
    cumulative = weights.cumsum(0)
    total = float(cumulative[-1])
    # u · total can round up to total, which nothing exceeds.
    target = min(u * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, target, right=True))


# --- log-probabilities --------------------------------------------------------------------------


def _with_logprobs(logits_V: torch.Tensor, wanted: int | None, token: int) -> TokenOut:
    if wanted is None:
        return TokenOut(token)
    logprobs = logits_V.double().log_softmax(dim=-1)
    likeliest = _largest(logprobs, min(wanted, len(logprobs))).tolist() if wanted else []
    top = tuple((i, float(logprobs[i])) for i in likeliest)
    return TokenOut(token, float(logprobs[token]), top)
