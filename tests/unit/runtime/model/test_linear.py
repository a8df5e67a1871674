"""Linear layers: both implementations, and how one is chosen."""

from __future__ import annotations

import platform

import pytest
import torch

from penstock_runtime.model import linear
from penstock_runtime.model.linear import PackedLinear, PlainLinear, compute_dtype, make_linear

CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    not linear._packing_works(torch.float32), reason="this build of torch has no packed product"
)


@pytest.fixture
def weight():
    return torch.randn(96, 40, generator=torch.Generator().manual_seed(0))


@packs
@pytest.mark.parametrize("bias", [None, torch.arange(96.0)])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_packed_equals_plain(weight, bias, rows):
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(weight, bias)(x), PlainLinear(weight, bias)(x))


@packs
def test_a_row_of_the_packed_product_does_not_depend_on_the_others(weight):
    x = torch.randn(65, 40, generator=torch.Generator().manual_seed(1))
    product = PackedLinear(weight, None)
    together = product(x)
    for rows in (1, 2, 7, 32):
        assert torch.equal(product(x[:rows]), together[:rows])


def test_the_plain_product_is_the_fallback(weight, monkeypatch):
    monkeypatch.setattr(linear, "_packing_works", lambda _: False)
    assert isinstance(make_linear(weight, None), PlainLinear)


def test_a_build_without_the_private_operators(monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(linear, "PackedLinear", missing)
    assert linear._packing_works.__wrapped__(torch.float32) is False


def test_narrow_dtypes_are_widened_where_the_cpu_lacks_instructions(monkeypatch):
    monkeypatch.setattr(linear, "_multiplies_natively", lambda _: False)
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32
    assert compute_dtype(torch.float32, CPU) == torch.float32
    assert compute_dtype(torch.bfloat16, torch.device("cuda", 0)) == torch.bfloat16
    monkeypatch.setattr(linear, "_multiplies_natively", lambda _: True)
    assert compute_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "dtype", "native"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, True),
        ({"amx_bf16": True}, torch.bfloat16, True),
        ({"avx512_bw": True}, torch.bfloat16, False),
        ({"avx512_bf16": True}, torch.float16, False),
        ({"avx512_fp16": True}, torch.float16, True),
    ],
)
def test_x86_flags_decide(monkeypatch, flags, dtype, native):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert linear._multiplies_natively.__wrapped__(dtype) is native
