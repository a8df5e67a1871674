"""One float32 service for all faults that it heals from: that it does is part of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.integration.faults.cluster import CONTEXT, Cluster, service
from tests.integration.faults.streams import Reference
from tests.integration.system import checkpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return checkpoint.make(tmp_path_factory.mktemp("model"), context=CONTEXT)


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="session")
def _service(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    with service(tmp_path_factory.mktemp("faults"), model) as found:
        yield found


@pytest.fixture
async def cluster(_service: Cluster) -> Cluster:
    """The service, ready; started unless the test before has left it running."""
    _service.up()
    await _service.ready()
    return _service


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with cluster.client() as client:
        yield client
