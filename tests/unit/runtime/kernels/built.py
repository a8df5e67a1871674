"""The kernels, for tests that are about them."""

from __future__ import annotations

from functools import cache

import pytest

from penstock_runtime.kernels import build
from penstock_runtime.kernels.library import KernelsUnavailable
from penstock_runtime.kernels.native import Kernels


@cache
def _kernels() -> Kernels:
    return Kernels()


def built_kernels() -> Kernels:
    """Return them. They must have been built where there is a compiler; elsewhere, skip."""
    try:
        return _kernels()
    except KernelsUnavailable as error:
        if build.find_compiler() is None:
            pytest.skip(f"no C++ compiler here, so {error}")
        pytest.fail(f"there is a C++ compiler here, but {error}", pytrace=False)
