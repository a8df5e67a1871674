"""Attention over pages: right for every shape, and the same bits however a token is computed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kernels.native import KvPages, Segments, TokenSlots
from penstock_runtime.kvcache.base import pages_for

from .built import built_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With products of pairs, emulated where the processor has none: of pages of bfloat16 only.
FORMATS = [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)]


@pytest.fixture(scope="module")
def kernels():
    return built_kernels()


class World:
    """Sequences whose q, k and v are known for every position; pages of a size, in any order."""

    def __init__(
        self, lengths, *, heads, kv_heads, key_dim, value_dim, dtype, page_size, positive=False
    ):
        generator = torch.Generator().manual_seed(0)
        self.heads, self.kv_heads, self.dtype = heads, kv_heads, dtype
        self.page_size = page_size

        def draw(*shape):
            return [torch.randn(n, *shape, generator=generator) for n in lengths]

        self.q, self.k = draw(heads, key_dim), draw(kv_heads, key_dim)
        if positive:
            self.q, self.k = [q.abs() for q in self.q], [k.abs() for k in self.k]
        self.v = draw(kv_heads, value_dim)
        counts = [pages_for(n, page_size) for n in lengths]
        pages = list(range(sum(counts)))
        random.Random(page_size).shuffle(pages)
        self.pages = [[pages.pop() for _ in range(count)] for count in counts]
        # Two layers, so that pages lie apart, and full of what others left behind.
        shape = (sum(counts), 2, kv_heads, page_size)
        self.keys = torch.full((*shape, key_dim), torch.nan, dtype=dtype)[:, 1]
        self.values = torch.full((*shape, value_dim), torch.nan, dtype=dtype)[:, 1]
        for pages_of, k, v in zip(self.pages, self.k, self.v, strict=True):
            for position in range(len(k)):
                page, offset = pages_of[position // page_size], position % page_size
                self.keys[page, :, offset] = k[position].to(dtype)
                self.values[page, :, offset] = v[position].to(dtype)

    def attend(self, kernels, spans, scale=0.3, *, pairs=False):
        """Return the output of each (sequence, start, length)."""
        used = [self.pages[s][: pages_for(start + n, self.page_size)] for s, start, n in spans]
        lengths = [n for _, _, n in spans]
        segments = Segments(
            starts=[start for _, start, _ in spans],
            lengths=lengths,
            first_rows=[0, *itertools.accumulate(lengths)][:-1],
            first_pages=[0, *itertools.accumulate(map(len, used))][:-1],
            pages=list(itertools.chain(*used)),
        )
        q = torch.cat([self.q[s][start : start + n] for s, start, n in spans]).flatten(1)
        kv = KvPages(self.keys, self.values)
        out = kernels.attention(q, segments, kv, heads=self.heads, scale=scale, round_inputs=pairs)
        return torch.split(out.view(len(q), self.heads, -1), lengths)

    def _of_every_head(self, x):
        return x.to(self.dtype).double().repeat_interleave(self.heads // self.kv_heads, dim=1)

    def scores(self, sequence, scale):
        """Return those of every position, in float64 (positions, heads, keys)."""
        q, k = self.q[sequence].double(), self._of_every_head(self.k[sequence])
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores = torch.einsum("mnh,lnh->mnl", q, k) * scale
        return scores.masked_fill(future[:, None], -torch.inf)

    def exact(self, sequence, scale=0.3):
        """Return the output of every position in float64."""
        weights = self.scores(sequence, scale).softmax(-1)
        return torch.einsum("mnl,lnh->mnh", weights, self._of_every_head(self.v[sequence]))


shapes = {
    "kv_heads": st.sampled_from([1, 2, 3]),
    "group": st.sampled_from([1, 2, 5, 8]),
    "key_dim": st.sampled_from([2, 8, 12, 24, 64, 128, 256]),
    "value_dim": st.sampled_from([8, 12, 16, 40, 64, 256]),
    "form": st.sampled_from(FORMATS),
    "page_size": st.sampled_from([1, 5, 16, 32, 128]),
}


@given(**shapes, length=st.integers(1, 200), first=st.integers(0, 199))
@settings(max_examples=60, deadline=None)
def test_any_shape(kernels, kv_heads, group, key_dim, value_dim, form, page_size, length, first):
    dtype, pairs = form
    world = World(
        [length],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        page_size=page_size,
    )
    first %= length
    scale = key_dim**-0.5
    exact = world.exact(0, scale)
    (chunk,) = world.attend(kernels, [(0, first, length - first)], scale, pairs=pairs)
    (last,) = world.attend(kernels, [(0, length - 1, 1)], scale, pairs=pairs)
    # q and the weights are rounded to eight bits: an error of 2⁻⁹ in a score of a few units, and in
    # each weight of an average of values of a few units.
    atol, rtol = (0.05, 0.0) if pairs else (3e-6, 1e-5)
    torch.testing.assert_close(chunk.double(), exact[first:], atol=atol, rtol=rtol)
    torch.testing.assert_close(last.double(), exact[-1:], atol=atol, rtol=rtol)
    assert torch.equal(last[0], chunk[-1])


@given(
    data=st.data(),
    form=st.sampled_from(FORMATS),
    group=st.sampled_from([1, 2, 7]),
    kv_heads=st.sampled_from([2, 3, 8]),
    dims=st.sampled_from([(24, 16), (64, 64), (32, 24)]),
)
@settings(max_examples=60, deadline=None)
def test_bits_depend_on_the_position_alone(kernels, data, form, group, kv_heads, dims):
    """Not on the neighbours, the chunks, the pages, the number of threads or of heads in a task."""
    dtype, pairs = form
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    shape = {"heads": kv_heads * group, "kv_heads": kv_heads, "dtype": dtype}
    shape |= {"key_dim": dims[0], "value_dim": dims[1]}
    whole = World(lengths, **shape, page_size=32)
    known = [whole.attend(kernels, [(s, 0, n)], pairs=pairs)[0] for s, n in enumerate(lengths)]
    other = World(lengths, **shape, page_size=data.draw(st.sampled_from([1, 7, 16, 64])))
    spans = []
    for sequence, length in enumerate(lengths):
        start = data.draw(st.integers(0, length - 1))
        spans.append((sequence, start, data.draw(st.integers(1, length - start))))
    random.Random(len(spans)).shuffle(spans)
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    try:
        parts = other.attend(kernels, spans, pairs=pairs)
    finally:
        torch.set_num_threads(1)
    for (sequence, start, length), part in zip(spans, parts, strict=True):
        assert torch.equal(part, known[sequence][start : start + length])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_long_sequences_are_shared_out_among_threads_with_the_same_bits(kernels, threads):
    length = 3000
    shape = {"heads": 2, "kv_heads": 1, "key_dim": 8, "value_dim": 8, "dtype": torch.float32}
    world = World([length, 40], **shape, page_size=16)
    (known,) = world.attend(kernels, [(0, 0, length)])
    torch.testing.assert_close(known.double(), world.exact(0), atol=1e-6, rtol=1e-5)
    torch.set_num_threads(threads)
    try:
        for start, count in [(length - 1, 1), (1023, 1), (1024, 1), (1020, 10), (2040, 40)]:
            alone, _ = world.attend(kernels, [(0, start, count), (1, 39, 1)])
            assert torch.equal(alone, known[start : start + count])
    finally:
        torch.set_num_threads(1)


def test_pairs_are_the_rounding_of_what_they_multiply(kernels):
    """With q, weights and values that are bfloat16 already, both formats are the same product."""
    world = World(
        [1], heads=2, kv_heads=1, key_dim=32, value_dim=32, dtype=torch.bfloat16, page_size=4
    )
    for pairs in (False, True):
        # One key: what is multiplied by its weight is divided by it.
        (out,) = world.attend(kernels, [(0, 0, 1)], pairs=pairs)
        value = world.v[0][0].bfloat16().float().expand(2, -1)
        torch.testing.assert_close(out[0], value, atol=0, rtol=2.0**-22)


@pytest.mark.parametrize(("dtype", "pairs"), FORMATS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, -1.0, 100.0, -100.0, 1e9, -1e9])
def test_scores_of_any_size(kernels, scale, dtype, pairs):
    """All negative, too, so far apart that keys have no weight, and beyond whole numbers."""
    shape = {"heads": 2, "kv_heads": 1, "key_dim": 32, "value_dim": 16, "dtype": dtype}
    world = World([700], **shape, page_size=16, positive=True)
    (out,) = world.attend(kernels, [(0, 0, 700)], scale, pairs=pairs)
    (last,) = world.attend(kernels, [(0, 699, 1)], scale, pairs=pairs)
    assert torch.equal(out[-1:], last)
    values = world.v[0].to(dtype).float()
    assert (out <= values.cummax(0).values + 1e-6).all()
    assert (out >= values.cummin(0).values - 1e-6).all()
    if pairs:
        return
    # The error of a score is a part of it: where scores are huge, one key must be clearly the best.
    scores = world.scores(0, scale)
    best, second = scores.topk(2).values.unbind(-1)
    clear = (best - second > 1e-5 * best.abs()) | torch.tensor(abs(scale) <= 100)
    atol = 1e-5 + 1e-5 * min(abs(scale), 100.0)
    exact = world.exact(0, scale)
    torch.testing.assert_close(out.double()[clear], exact[clear], atol=atol, rtol=0)
    assert clear.float().mean() > 0.9


def test_values_may_be_a_part_of_the_keys(kernels):
    """A latent: 16 elements that are keys, of which the first 8 are values as well."""
    torch.manual_seed(0)
    latent = torch.randn(3, 1, 4, 16)
    q = torch.randn(1, 2 * 16)
    segments = Segments(starts=[9], lengths=[1], first_rows=[0], first_pages=[0], pages=[2, 0, 1])
    out = kernels.attention(q, segments, KvPages(latent, latent[..., :8]), heads=2, scale=0.25)
    keys = latent[[2, 0, 1]].reshape(12, 16)[:10].double()
    weights = (q.double().view(2, 16) @ keys.T * 0.25).softmax(-1)
    torch.testing.assert_close(out.double().view(2, 8), weights @ keys[:, :8], atol=1e-6, rtol=1e-5)


@given(
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 12, 64]),
    dtype=st.sampled_from(DTYPES),
    normed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_norm_rotation_and_write_in_one_pass(
    kernels, tokens, kv_heads, group, head_dim, dtype, normed
):
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator)
    weight = torch.rand(heads + kv_heads, head_dim, generator=generator)
    turns = torch.randn(tokens, head_dim // 2, dtype=torch.complex64, generator=generator)
    pool = torch.zeros(tokens, 2, kv_heads, 3, head_dim, dtype=dtype)
    pages = torch.randperm(tokens, generator=generator)
    offsets = torch.randint(0, 3, (tokens,), generator=generator)

    qk = qkv[:, : heads + kv_heads].double()
    if normed:
        qk = torch.nn.functional.rms_norm(qk, (head_dim,), None, 1e-6) * weight
    pairs = torch.view_as_complex(qk.reshape(tokens, -1, head_dim // 2, 2))
    exact = torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    projected = qkv.flatten(1).clone()
    kernels.attention_inputs(
        projected,
        heads=heads,
        norm=(weight, 1e-6) if normed else None,
        rotations=turns,
        slots=TokenSlots([0] * tokens, pages.tolist(), offsets.tolist()),
        kv=KvPages(*pool.unbind(1)),
    )
    turned = projected.view(tokens, -1, head_dim)[:, :heads]
    torch.testing.assert_close(turned.double(), exact[:, :heads], atol=1e-5, rtol=1e-5)
    keys = pool[pages, 0, :, offsets].double()
    rounding = 1e-5 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(keys, exact[:, heads:], atol=1e-5, rtol=rounding)
    assert torch.equal(pool[pages, 1, :, offsets], qkv[:, heads + kv_heads :].to(dtype))
    written = torch.zeros(tokens, 3, dtype=torch.bool)
    written[pages, offsets] = True
    assert not pool.transpose(2, 3).transpose(1, 2)[~written].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 1e-45])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_narrowed_as_torch_does(kernels, value, dtype):
    qkv = torch.full((1, 6), value)
    pool = torch.zeros(1, 2, 1, 1, 2, dtype=dtype)
    kernels.attention_inputs(
        qkv.clone(),
        heads=1,
        norm=None,
        rotations=torch.ones(1, 1, dtype=torch.complex64),
        slots=TokenSlots([0], [0], [0]),
        kv=KvPages(*pool.unbind(1)),
    )
    expected = qkv[:, 4:].to(dtype)
    torch.testing.assert_close(pool[0, 1, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_pages_that_do_not_lie_as_expected_are_refused():
    pool = torch.zeros(2, 2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"keys of shape .* have strides"):
        KvPages(pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2))
    with pytest.raises(ValueError, match=r"pages are torch.float64"):
        KvPages(pool.double()[:, 0], pool.double()[:, 1])
