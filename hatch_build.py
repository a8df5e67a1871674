"""Compiles the C++ kernels at install, where there is a compiler.

Without one, nothing is lost but speed: the runtime then computes with torch, and says so.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType

BUILD = Path("runtime", "penstock_runtime", "kernels", "build.py")


class KernelsHook(BuildHookInterface[Any]):
    """Puts the libraries into the wheel, or beside the sources of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and name what was made. Never fails the install."""
        kernels = _load(Path(self.root) / BUILD)
        try:
            libraries = kernels.build()
        except kernels.BuildError as error:
            self.app.display_warning(f"the C++ kernels are left out: {error}")
            return
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


def _load(path: Path) -> ModuleType:
    """Return a module of the package that is being built, without importing the package."""
    spec = importlib.util.spec_from_file_location("penstock_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
