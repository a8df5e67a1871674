"""The pins live in pyproject.toml (for uv); constraints.txt repeats them for pip. Keep both equal.

python .ci/pins.py            write constraints.txt from pyproject.toml
python .ci/pins.py --check    fail if they differ, or a requirement has no pin
python .ci/pins.py --freeze   rewrite both from the packages of this environment
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--freeze", action="store_true")
    arguments = parser.parse_args()
    if arguments.freeze:
        _freeze()
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    pins: list[str] = project["tool"]["uv"]["constraint-dependencies"]
    text = "# Exact pins, made by .ci/pins.py from pyproject.toml.\n" + "\n".join(pins) + "\n"
    if not arguments.check:
        CONSTRAINTS.write_text(text, encoding="utf-8")
        return 0
    problems = []
    if CONSTRAINTS.read_text(encoding="utf-8") != text:
        problems.append("constraints.txt differs from pyproject.toml: run python .ci/pins.py")
    pinned = {_normal(pin.split("==")[0]) for pin in pins}
    missing = sorted(set(_requirements(project)) - pinned)
    if missing:
        problems.append(f"no pin for {', '.join(missing)}: run python .ci/pins.py --freeze")
    print("\n".join(problems) or f"{len(pins)} pins agree")
    return 1 if problems else 0


def _requirements(project: dict[str, dict[str, object]]) -> list[str]:
    meta = project["project"]
    lists = [meta["dependencies"], *meta["optional-dependencies"].values()]  # type: ignore[attr-defined]
    lists += project["dependency-groups"].values()  # type: ignore[arg-type]
    names = [
        _normal(re.split(r"[\[<>=!~; ]", requirement)[0])
        for requirements in lists
        for requirement in requirements  # type: ignore[attr-defined]
        if isinstance(requirement, str)
    ]
    return [name for name in names if name != "penstock"]


def _freeze() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    project = tomllib.loads(text)
    before = dict(pin.split("==") for pin in project["tool"]["uv"]["constraint-dependencies"])
    installed = {
        _normal(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()
    }
    # An environment without the gpu extra must not lose its pins.
    kept = sorted(set(before) - set(installed))
    if kept:
        print(f"kept, as they are not installed here: {', '.join(kept)}")
    skip = {"penstock", "pip", "setuptools", "wheel", "uv"}
    pins = "".join(
        f'  "{name}=={version}",\n'
        for name, version in sorted((before | installed).items())
        if name not in skip
    )
    text = re.sub(
        r"(?s)constraint-dependencies = \[.*?\n\]",
        lambda _: f"constraint-dependencies = [\n{pins}]",
        text,
    )
    PYPROJECT.write_text(text, encoding="utf-8")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
