"""Matrix products, norms and gates: right, and the same bits whatever is computed beside a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .built import built_kernels

if TYPE_CHECKING:
    from penstock_runtime.kernels.native import Kernels, Weight


@pytest.fixture(scope="module")
def kernels():
    return built_kernels()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


sizes = {
    "rows": st.one_of(st.integers(1, 40), st.sampled_from([143, 144, 145, 300])),
    "outputs": st.one_of(st.integers(1, 70), st.sampled_from([256, 320])),
    "inputs": st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 258, 600])),
}


@given(**sizes, bias=st.booleans(), add=st.booleans(), narrow=st.booleans(), pairs=st.booleans())
@settings(max_examples=150, deadline=None)
def test_linear(kernels, rows, outputs, inputs, bias, add, narrow, pairs):
    x, weight = draw(rows, inputs), draw(outputs, inputs) / inputs**0.5
    if narrow:
        weight = weight.bfloat16()
    packed = kernels.pack(weight, round_inputs=pairs)
    b, before = draw(outputs, seed=1) if bias else None, draw(rows, outputs, seed=2)
    rounded = pairs and narrow and inputs % 2 == 0
    exact = (x.bfloat16() if rounded else x).double() @ weight.double().T
    exact += 0 if b is None else b.double()
    if add:
        actual = before.clone()
        assert kernels.linear(x, packed, b, add_to=actual) is actual
        exact += before.double()
    else:
        actual = kernels.linear(x, packed, b)
    torch.testing.assert_close(actual.double(), exact, atol=1e-5, rtol=1e-5)


@given(
    **sizes,
    first=st.integers(0, 299),
    count=st.integers(1, 50),
    threads=st.integers(1, 4),
    narrow=st.booleans(),
    pairs=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_bits_of_linear_depend_on_the_row_alone(
    kernels, rows, outputs, inputs, first, count, threads, narrow, pairs
):
    x, weight = draw(rows, inputs), draw(outputs, inputs)
    packed = kernels.pack(weight.bfloat16() if narrow else weight, round_inputs=pairs)
    bias, y = draw(outputs, seed=1), draw(rows, outputs, seed=2)
    first %= rows
    part = slice(first, min(rows, first + count))
    together, added = kernels.linear(x, packed, bias), y.clone()
    kernels.linear(x, packed, add_to=added)
    torch.set_num_threads(threads)
    try:
        alone, added_alone = kernels.linear(x[part], packed, bias), y[part].clone()
        kernels.linear(x[part], packed, add_to=added_alone)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, together[part])
    assert torch.equal(added_alone, added[part])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_float32_weight_of_narrow_values_is_kept_as_is_and_gives_the_same_bits(kernels, narrow):
    weight = draw(40, 64).bfloat16()
    x = draw(7, 64)
    wide = kernels.pack(weight.float())
    assert wide.packed.dtype == torch.bfloat16
    assert torch.equal(kernels.linear(x, wide), kernels.linear(x, kernels.pack(weight)))
    precise = draw(40, 64).to(narrow if narrow == torch.float16 else torch.float32)
    assert kernels.pack(precise).packed.dtype == torch.float32


def elements(kernels: Kernels, packed: Weight) -> torch.Tensor:
    """Return the weight that was packed: what it makes of rows with a single 1."""
    return kernels.linear(torch.eye(packed.inputs), packed).T


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 40).map(lambda x: 4 * x),
    others=st.sampled_from([0.0, 1e-4, 1e-3]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_coding_loses_no_bit(kernels, outputs, inputs, others, seed):
    """Weights are alike but for some, which could be any finite number that is not subnormal."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=g).mul(0.02).bfloat16()
    exponents = torch.randint(1, 255, weight.shape, generator=g)
    bits = torch.randint(0, 2, weight.shape, generator=g) << 15 | exponents << 7
    bits |= torch.randint(0, 128, weight.shape, generator=g)
    any_number = bits.to(torch.uint16).view(torch.bfloat16)
    weight = torch.where(torch.rand(weight.shape, generator=g) < others, any_number, weight)
    packed = kernels.pack(weight, round_inputs=True)
    assert torch.equal(elements(kernels, packed), weight.float())


def test_alike_weights_take_12_bits_and_a_few(kernels):
    """Of a normal distribution one element in 10⁴ is not in the table: 1.2 % of 128 together."""
    weight = draw(512, 1024).mul(0.02).bfloat16()
    packed = kernels.pack(weight, round_inputs=True).packed
    assert 12 <= 8 * packed.nbytes / weight.numel() <= 12.5


def test_weights_of_any_exponent_are_packed_as_they_are(kernels):
    bits = torch.randint(0, 2**16, (64, 256), generator=torch.Generator().manual_seed(0))
    weight = (bits & 0xBFFF | 0x0080).to(torch.uint16).view(torch.bfloat16)  # finite
    packed = kernels.pack(weight, round_inputs=True)
    assert packed.packed.dtype == torch.bfloat16
    assert torch.equal(elements(kernels, packed), weight.float())
    after = draw(64, 256).bfloat16()
    coded = kernels.pack(after, round_inputs=True)
    assert coded.packed.dtype == torch.uint8
    assert torch.equal(elements(kernels, coded), after.float())
    assert torch.equal(elements(kernels, packed), weight.float())


def test_rows_may_lie_apart(kernels):
    weight = kernels.pack(draw(20, 16))
    x = draw(5, 48)
    assert torch.equal(
        kernels.linear(x[:, 16:32], weight), kernels.linear(x[:, 16:32].contiguous(), weight)
    )


def test_no_rows(kernels):
    assert kernels.linear(draw(0, 16), kernels.pack(draw(20, 16))).shape == (0, 20)


@given(rows=st.integers(1, 9), columns=st.integers(1, 80), scale=st.sampled_from([1e-3, 1.0, 50.0]))
@settings(max_examples=40, deadline=None)
def test_norm_and_gate(kernels, rows, columns, scale):
    x, weight = draw(rows, columns) * scale, draw(columns, seed=1)
    exact = torch.nn.functional.rms_norm(x.double(), (columns,), weight.double(), 1e-6)
    normed = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(normed.double(), exact, atol=1e-6, rtol=2e-6)

    gate_up = draw(rows, 2 * columns) * scale
    gate, up = gate_up.double().chunk(2, dim=-1)
    gated = kernels.silu_multiply(gate_up)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(gated.double(), exact, atol=1e-6, rtol=2e-6)

    for row in range(rows):
        one = slice(row, row + 1)
        assert torch.equal(kernels.rms_norm(x[one], weight, 1e-6), normed[one])
        assert torch.equal(kernels.silu_multiply(gate_up[one].clone()), gated[one])


def test_the_gate_at_its_ends(kernels):
    x = torch.tensor([[-torch.inf, -1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.inf]])
    (y,) = kernels.silu_multiply(torch.cat([x, torch.ones_like(x)], dim=1))
    assert (y[:3] <= 0).all()
    assert (y[:3] > -1e-35).all()
    assert torch.equal(y[3:], x[0, 3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.linear(draw(2, 8).double(), k.pack(draw(4, 8))), "x is torch.float64"),
        (lambda k: k.linear(draw(2, 7), k.pack(draw(4, 8))), "expected torch.float32 rows of 8"),
        (lambda k: k.linear(draw(8, 2).T, k.pack(draw(4, 8))), "strides"),
        (lambda k: k.linear(draw(2, 8), k.pack(draw(4, 8)), draw(5)), "bias is"),
        (lambda k: k.linear(draw(2, 8), k.pack(draw(4, 8)), add_to=draw(4, 2).T), "strides"),
        (lambda k: k.rms_norm(draw(2, 8), draw(9), 1e-6), "weight is"),
        (lambda k: k.silu_multiply(draw(4, 2).T), "strides"),
    ],
)
def test_what_a_kernel_would_misread_is_refused(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call(kernels)
