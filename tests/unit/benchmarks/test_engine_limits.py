from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from engine_limits import limit_shares
from engine_worker import Options, Row, Task

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
}
PROJECTIONS = 8 * 4 * (4 + 2 + 2) + 4 * 4 * 8
"""Elements of a layer's matrices of q, k, v and the output."""
LAYER = PROJECTIONS + 3 * 8 * 16
MATRICES = 3 * LAYER + 32 * 8
MATRIX_BYTES = 1000
LIMITS = {
    "float32_gflops": 1e-9,
    "bfloat16_gflops": 2e-9,
    "read_gbytes": 1e-9,
    "matrix_bytes": float(MATRIX_BYTES),
}
"""One operation and one byte a second, two operations in bfloat16."""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return Options(
        model=tmp_path,
        dtype="bfloat16",
        threads=1,
        kv_bytes=0,
        chunk_tokens=512,
        kernels="native",
    )


def test_a_prompt_is_held_against_arithmetic(options: Options) -> None:
    # All tokens meet the first two layers and the last one's keys and values, the last token the
    # rest; a token's query meets its own key and those before it, in products of q·k and p·v.
    every = 2 * LAYER + 8 * 4 * 2 * 2
    last = LAYER - 8 * 4 * 2 * 2 + 32 * 8
    pairs = 2 * (1 + 2 + 3) + 3
    operations = 2 * (3 * every + last) + 2 * 2 * pairs * 4 * 4
    task = Task(Row("prefill", 3), 0, 512, 32)
    shares = limit_shares(options, task, 3 * 2 / operations, LIMITS, given=1)
    assert shares.share == pytest.approx(1)
    assert shares.model_share is None


def test_a_step_is_held_against_reading_what_it_reads_and_what_the_model_has(
    options: Options,
) -> None:
    task = Task(Row("decode", 2), 0, context=10, steps=4)
    kv = 2 * 2 * (10 + 4 / 2) * 3 * 2 * 2 * 4
    shares = limit_shares(options, task, 2 / (MATRIX_BYTES + kv), LIMITS, given=1)
    assert shares.share == pytest.approx(1)
    assert shares.model_share == pytest.approx((2 * MATRICES + kv) / (MATRIX_BYTES + kv))


def test_torch_reads_matrices_widened_to_float32(options: Options) -> None:
    task = Task(Row("decode", 1), 0, context=0, steps=0)
    shares = limit_shares(
        options, task, 1 / (4 * MATRICES), LIMITS | {"matrix_bytes": 0.0}, given=1
    )
    assert shares.share == pytest.approx(1)
    assert shares.model_share == pytest.approx(0.5)


@pytest.mark.parametrize("row", [Row("prefill", 3), Row("decode", 2)])
def test_what_the_host_took_was_not_to_be_had(options: Options, row: Row) -> None:
    task = Task(row, 0, 512, 32)
    whole, less = (limit_shares(options, task, 1, LIMITS, given=given) for given in (1, 0.8))
    assert less.share == pytest.approx(whole.share / 0.8)
