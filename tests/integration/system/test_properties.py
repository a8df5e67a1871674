"""Property: whatever the shape of the service and the mix of prompts, tokens are transformers'."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer
from tests.integration.system import checkpoint
from tests.integration.system.service import Shape, running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def reference(model: Path) -> checkpoint.Reference:
    return checkpoint.Reference(model)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    page = draw(st.sampled_from([4, 8, 16, 32]))
    return Shape(
        stages=draw(st.integers(0, 3)),
        decodes=draw(st.integers(1, 2)),
        page_size=page,
        chunk=page * draw(st.integers(1, 20)),
        chunk_mode=draw(st.sampled_from(["adaptive", "fixed"])),
        # The longest request needs 200 tokens; less than that for all of them means preemption.
        pages=draw(st.integers(220, 800)) // page,
        local_tokens=draw(st.integers(0, 40)),
        max_batch=draw(st.integers(2, 8)),
    )


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[int, ...]]]:
    """Rounds of prompts that run at once; some share a prefix, some come again."""
    rng = random.Random(draw(st.integers(0, 1000)))
    shared = [rng.randrange(checkpoint.EOS) for _ in range(draw(st.integers(0, 80)))]
    rounds = []
    for _ in range(draw(st.integers(1, 2))):
        lengths = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5))
        rounds.append(
            [tuple(shared + [rng.randrange(checkpoint.EOS) for _ in range(n)]) for n in lengths]
        )
    return [*rounds, rounds[0]]


# One example starts and stops a service: few of them, and no deadline.
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=shapes(), rounds=batches())
@pytest.mark.timeout(300)
def test_tokens_equal_transformers(
    model: Path,
    reference: checkpoint.Reference,
    shape: Shape,
    rounds: list[list[tuple[int, ...]]],
) -> None:
    async def serve() -> None:
        fabric = Fabric()
        with tempfile.TemporaryDirectory() as folder:
            async with running(
                model, Path(folder), shape, lambda: InMemoryTransfer(fabric)
            ) as service:
                for prompts in rounds:
                    answers = await asyncio.gather(*(service.complete(p, 20) for p in prompts))
                    for prompt, answer in zip(prompts, answers, strict=True):
                        assert answer.tokens == reference.greedy(prompt, 20), len(prompt)
                await service.settled()

    asyncio.run(serve())
