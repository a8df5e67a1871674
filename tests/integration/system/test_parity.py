"""The whole service gives the very tokens that transformers gives, whatever happens inside."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer
from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from tests.integration.system import checkpoint
from tests.integration.system.service import Shape, running

if TYPE_CHECKING:
    from pathlib import Path

    from penstock_runtime.transfer.base import Transfer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> checkpoint.Reference:
    return checkpoint.Reference(model)


def nixl() -> Transfer:
    return NixlTransfer(NixlSettings(devices="lo"))


def prompts(seed: int, lengths: list[int], shared: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    prefix = [rng.randrange(checkpoint.EOS) for _ in range(shared)]
    return [
        tuple(prefix + [rng.randrange(checkpoint.EOS) for _ in range(length)]) for length in lengths
    ]


async def test_two_stages_over_nixl(
    model: Path, reference: checkpoint.Reference, tmp_path: Path
) -> None:
    async with running(model, tmp_path, Shape(chunk=64), nixl) as service:
        batch = prompts(1, [1, 7, 16, 17, 100, 333, 64, 65])
        answers = await asyncio.gather(*(service.complete(p, 12) for p in batch))
        for prompt, answer in zip(batch, answers, strict=True):
            assert answer.tokens == reference.greedy(prompt, 12), len(prompt)
        engine = service.decodes[0].engine
        assert engine.stats.remote_prefills >= 6
        await service.settled()


async def test_prefix_hits_on_both_sides(
    model: Path, reference: checkpoint.Reference, tmp_path: Path
) -> None:
    """A second turn finds its first wherever it goes; a sibling finds the group's pages."""
    async with running(model, tmp_path, Shape(decodes=2), nixl) as service:
        first, sibling = prompts(2, [100, 120], shared=160)
        one = await service.complete(first, 24)
        assert one.tokens == reference.greedy(first, 24)
        assert one.cached == 0
        second = first + one.tokens + prompts(3, [90])[0]
        two = await service.complete(second, 12)
        assert two.tokens == reference.greedy(second, 12)
        assert two.cached >= 256
        three = await service.complete(sibling, 12)
        assert three.tokens == reference.greedy(sibling, 12)
        assert three.cached >= 160
        again = await service.complete(first, 24)
        assert again.tokens == one.tokens
        assert again.cached >= 256
        await service.settled()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(stages=0, page_size=4, chunk=64, pages=512),
        Shape(stages=1, page_size=8, chunk=8),
        Shape(stages=2, page_size=16, chunk=16, chunk_mode="fixed"),
        Shape(stages=2, page_size=16, chunk=1024),
        Shape(stages=3, page_size=32, chunk=96, chunk_mode="fixed"),
        Shape(stages=4, page_size=4, chunk=40, pages=600),
        Shape(stages=2, layers="3,1", pages=512),
        Shape(stages=2, layers="2.5,1.5", page_size=8, chunk=48, pages=512),
        Shape(stages=3, layers="1.5,1,1.5", page_size=8, chunk=24),
        Shape(stages=2, page_size=16, chunk=64, pages=40, decodes=1),
    ],
    ids=lambda s: f"stages{s.stages}-page{s.page_size}-chunk{s.chunk}-pages{s.pages}",
)
async def test_any_shape_gives_the_same_tokens(
    model: Path, reference: checkpoint.Reference, tmp_path: Path, shape: Shape
) -> None:
    """Chunks from one page to the whole prompt, mixed batches, and KV too small for all."""
    fabric = Fabric()
    rng = random.Random(shape.chunk + shape.page_size)
    batch = prompts(4, [rng.randrange(1, 400) for _ in range(10)]) + prompts(5, [20, 50], 200)
    async with running(model, tmp_path, shape, lambda: InMemoryTransfer(fabric)) as service:
        answers = await asyncio.gather(*(service.complete(p, 16) for p in batch))
        for prompt, answer in zip(batch, answers, strict=True):
            assert answer.tokens == reference.greedy(prompt, 16), len(prompt)
        await service.settled()


async def test_preemption_does_not_change_tokens(
    model: Path, reference: checkpoint.Reference, tmp_path: Path
) -> None:
    shape = Shape(stages=0, page_size=4, pages=48, chunk=64)
    batch = prompts(6, [30, 30, 30, 30])
    async with running(model, tmp_path, shape, nixl) as service:
        answers = await asyncio.gather(*(service.complete(p, 40) for p in batch))
        for prompt, answer in zip(batch, answers, strict=True):
            assert answer.tokens == reference.greedy(prompt, 40)
        assert service.decodes[0].engine.scheduler.preemptions > 0
        await service.settled()
