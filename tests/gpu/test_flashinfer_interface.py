"""What we take FlashInfer's interface to be is what the package has."""

from __future__ import annotations

import inspect

import pytest

from penstock_runtime.flashinfer_library import load_flashinfer
from tests.unit.runtime import fake_flashinfer

pytestmark = pytest.mark.gpu

FUNCTIONS = (
    "append_paged_kv_cache",
    "rmsnorm",
    "silu_and_mul",
    "apply_rope_with_cos_sin_cache_inplace",
)
WRAPPERS = ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")


def check(ours: object, theirs: object) -> None:
    """Every parameter of ours exists there, positional ones at the same place."""
    mine = inspect.signature(ours).parameters  # type: ignore[arg-type]
    real = inspect.signature(theirs).parameters  # type: ignore[arg-type]
    names = [name for name, p in mine.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert list(real)[: len(names)] == names
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in real.values())
    assert takes_any or set(mine) <= set(real)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    check(getattr(fake_flashinfer, name), getattr(load_flashinfer(), name))


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_wrappers(name: str, method: str) -> None:
    ours, theirs = getattr(fake_flashinfer, name), getattr(load_flashinfer(), name)
    check(getattr(ours, method), getattr(theirs, method))
