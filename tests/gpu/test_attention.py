"""FlashInfer on our pages equals the definition, on the GPU itself, in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock_runtime.attention.base import AttentionBackend, AttentionShape, single_rows
from penstock_runtime.attention.flashinfer import FlashInferAttention
from penstock_runtime.attention.reference import ReferenceAttention
from penstock_runtime.flashinfer_library import load_flashinfer
from tests.unit.runtime.attention.test_backends import (
    LAYERS,
    make_pool,
    make_segments,
    queries,
    write_and_attend,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CUDA = torch.device("cuda", 0)
BATCHES = {
    "decode": [(0, 1), (5, 1), (63, 1), (64, 1), (700, 1)],
    "chunks": [(0, 1), (0, 17), (33, 64), (500, 3)],
    "mixed": [(90, 1), (0, 1), (3, 1), (31, 2), (0, 200), (128, 1)],
    "many": [(3 * i, 1) for i in range(70)],
}


@pytest.mark.parametrize("spans", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (2, 3), (2, 4), (1, 7), (8, 8)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_equals_the_definition(spans, page_size, kv_heads, group, head_dim, dtype):
    heads, scale = kv_heads * group, head_dim**-0.5
    shape = AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    segments, pages = make_segments(spans, page_size)
    q, k, v = (x.to(CUDA) for x in queries(spans, heads, kv_heads, head_dim, dtype))
    backend = FlashInferAttention(load_flashinfer(), shape, CUDA)
    for layer in (0, LAYERS - 1):
        outputs, pools = [], []
        backends: tuple[AttentionBackend[Any], ...] = (ReferenceAttention(), backend)
        for each in backends:
            pool = make_pool(pages, kv_heads, page_size, head_dim, dtype).tensor.to(CUDA)
            plan = each.plan(segments, page_size, CUDA)
            outputs.append(write_and_attend(each, plan, (q, k, v), pool[:, layer], scale))
            pools.append(pool)
        torch.testing.assert_close(outputs[1], outputs[0], atol=3e-2, rtol=3e-2)
        assert torch.equal(pools[1], pools[0]), "KV was not written where it belongs"


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (2, 4), (8, 8)])
@torch.inference_mode()
def test_wanted_rows_are_planned_beside_their_batch(kv_heads, group):
    """Both plans are used in turn, as by the last layer; one must not disturb the other."""
    heads, head_dim, page_size, dtype = kv_heads * group, 128, 32, torch.bfloat16
    shape = AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    segments, pages = make_segments(BATCHES["mixed"], page_size)
    q, k, v = (x.to(CUDA) for x in queries(BATCHES["mixed"], heads, kv_heads, head_dim, dtype))
    backend = FlashInferAttention(load_flashinfer(), shape, CUDA)
    pool = make_pool(pages, kv_heads, page_size, head_dim, dtype).tensor.to(CUDA)
    rows = [0, 2, 4, 60, 204, 205]
    plan = backend.plan(segments, page_size, CUDA)
    wanted = backend.plan_rows(single_rows(segments, rows), page_size, CUDA)
    for layer in range(LAYERS):
        whole = write_and_attend(backend, plan, (q, k, v), pool[:, layer], head_dim**-0.5)
        some = backend.attend(wanted, q[rows], pool[:, layer], head_dim**-0.5)
        torch.testing.assert_close(some, whole[rows], atol=3e-2, rtol=3e-2)
