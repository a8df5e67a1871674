"""Several ranks a worker give the very tokens of one, whichever worker has how many."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from tests.integration.system import checkpoint
from tests.integration.system.service import Shape, running
from tests.integration.system.test_parity import prompts

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


@pytest.mark.parametrize(
    ("stages", "prefill", "decode"),
    [
        (0, 1, 2),
        (1, 2, 2),
        (2, 1, 2),
        (2, 2, 1),
        (2, 2, 2),
        (4, 2, 2),
        # The model has two KV heads: four ranks hold each of them twice.
        (1, 4, 2),
    ],
)
async def test_ranks_give_the_same_tokens(
    model: Path,
    reference: checkpoint.Reference,
    tmp_path: Path,
    stages: int,
    prefill: int,
    decode: int,
) -> None:
    shape = Shape(stages=stages, chunk=64, prefill_ranks=prefill, decode_ranks=decode)
    batch = prompts(stages, [1, 17, 100, 333, 64])
    async with running(model, tmp_path, shape, nixl) as service:
        answers = await asyncio.gather(*(service.complete(p, 12) for p in batch))
        for prompt, answer in zip(batch, answers, strict=True):
            assert answer.tokens == reference.greedy(prompt, 12), len(prompt)
        # What decode generated goes back to the stages, which never computed it.
        second = batch[3] + answers[3].tokens + prompts(9, [90])[0]
        again = await service.complete(second, 12)
        assert again.tokens == reference.greedy(second, 12)
        assert again.cached >= 320
        if stages:
            assert service.decodes[0].engine.stats.remote_prefills >= 3
        await service.settled()
