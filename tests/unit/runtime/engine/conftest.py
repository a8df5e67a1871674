"""A tiny model for tests of what an engine does with any model."""

from __future__ import annotations

import pytest

from tests.unit.runtime.model.checkpoints import CONFIGS, save, whole_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint."""
    path = tmp_path_factory.mktemp("llama")
    save(CONFIGS["llama"], path)
    return path


@pytest.fixture(scope="module")
def model(llama):
    return whole_model(llama, kernels="torch")
