"""The pool's memory is what transfers are told about it."""

from __future__ import annotations

import pytest
import torch

from penstock_runtime.kvcache.base import KVLayout
from penstock_runtime.kvcache.tensors import ALIGNMENT, PoolTensor

CPU = torch.device("cpu")
LAYOUT = KVLayout(
    first_layer=2, last_layer=5, planes=2, kv_heads=3, page_size=4, head_dim=10, itemsize=2
)


@pytest.fixture
def pool() -> PoolTensor:
    return PoolTensor(LAYOUT, 7, dtype=torch.bfloat16, device=CPU)


def test_one_aligned_zeroed_range_of_whole_pages(pool):
    assert pool.tensor.shape == (7, 3, 2, 3, 4, 10)
    assert pool.tensor.is_contiguous()
    assert pool.address % ALIGNMENT == 0
    assert pool.nbytes == 7 * LAYOUT.page_bytes == pool.tensor.nbytes
    assert not pool.tensor.any()


def test_a_page_starts_at_its_multiple_of_page_bytes(pool):
    for page in range(7):
        assert pool.tensor[page].data_ptr() == pool.address + page * LAYOUT.page_bytes
        layer = pool.layer(1)[page]
        assert layer.data_ptr() == pool.tensor[page].data_ptr() + LAYOUT.layer_bytes


def test_layers_are_views(pool):
    pool.layer(2)[5, 1, 0, 3] = 1.0
    assert pool.tensor[5, 2, 1, 0, 3].eq(1).all()
    assert pool.tensor.sum() == 10


def test_dtype_must_fit_the_layout():
    with pytest.raises(ValueError, match="4 bytes, the layout 2"):
        PoolTensor(LAYOUT, 1, dtype=torch.float32, device=CPU)
