"""Which kernels a process gets, and that it says why."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kernels import build, library
from penstock_runtime.kernels.build import BuildError, Level
from penstock_runtime.kernels.library import KernelsUnavailable
from penstock_runtime.kernels.selection import select_kernels
from penstock_runtime.worker.settings import parse

from .built import built_kernels

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def load_anew():
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Libraries are looked for in an empty folder, which is returned."""
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    return tmp_path


def test_the_library_is_used_where_it_is_built(caplog):
    built_kernels()
    caplog.set_level(logging.INFO)
    kernels = select_kernels("auto", CPU)
    assert kernels is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"kernels: our own, compiled for {kernels.level}"
    ]


def test_torch_on_demand_and_on_other_devices(caplog):
    caplog.set_level(logging.INFO)
    assert select_kernels("torch", CPU) is None
    assert select_kernels("auto", torch.device("cuda", 0)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: torch's, as asked for",
        "kernels: torch's, on cuda",
    ]
    with pytest.raises(ConfigurationError, match="--kernels native is for the CPU, not cuda"):
        select_kernels("native", torch.device("cuda", 0))


def missing(folder: Path, level: Level) -> None:
    pass


def damaged(folder: Path, level: Level) -> None:
    (folder / level.library.name).write_bytes(b"no library")


def foreign(folder: Path, level: Level) -> None:
    """A library that loads, but is not ours."""
    compile_c(folder, level, "int other() { return 1; }")


def stale(folder: Path, level: Level) -> None:
    compile_c(folder, level, 'const char* penstock_source_digest() { return "older"; }')


def unresolved(folder: Path, level: Level) -> None:
    """A library whose OpenMP runtime was not loaded by anyone."""
    code = "void no_such_openmp(); const char* penstock_source_digest()"
    compile_c(folder, level, f'{code} {{ no_such_openmp(); return ""; }}')


def compile_c(folder: Path, level: Level, code: str) -> None:
    built_kernels()  # skipped where there is no compiler
    source = folder / "library.c"
    source.write_text(code)
    target = folder / level.library.name
    compiler = build.find_compiler()
    assert compiler is not None
    options = ["-x", "c", "-shared", "-fPIC", "-Wl,-z,now"]
    subprocess.run([compiler, *options, str(source), "-o", str(target)], check=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (missing, "are not built"),
        (damaged, "cannot be loaded"),
        (foreign, "cannot be loaded"),
        (stale, "was made from other sources"),
        (unresolved, "no_such_openmp"),
    ],
)
def test_without_a_usable_library_torch_computes_and_the_log_says_why(
    make, reason, elsewhere, caplog
):
    make(elsewhere, usable_level())
    assert select_kernels("auto", CPU) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("kernels: torch's, slower: ")
    assert reason in record.getMessage()
    with pytest.raises(ConfigurationError, match="--kernels native: ") as caught:
        select_kernels("native", CPU)
    assert reason in str(caught.value)


def usable_level() -> Level:
    """The level that this processor would load."""
    capabilities = torch.cpu.get_capabilities()
    return next(level for level in build.levels() if all(map(capabilities.get, level.capabilities)))


def test_flags_decide_the_level(monkeypatch, elsewhere):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    opened: list[Level] = []
    monkeypatch.setattr(library, "_open", opened.append)
    v4_bf16, v4, v3 = build.levels()
    for level in (v4_bf16, v4, v3):
        level.library.touch()
        capabilities = dict.fromkeys(level.capabilities, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=capabilities: flags)
        library.load.cache_clear()
        library.load()
    assert opened == [v4_bf16, v4, v3]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    library.load.cache_clear()
    with pytest.raises(KernelsUnavailable, match="no kernels for this kind of processor"):
        library.load()


def test_one_openmp_runtime_in_the_process():
    """The library uses torch's, so that torch's number of threads is the kernels'."""
    built_kernels()
    code = (
        "import re, torch; from penstock_runtime.kernels.native import Kernels; k = Kernels();"
        "k.linear(torch.ones(64, 64), k.pack(torch.ones(64, 64)));"
        "maps = open('/proc/self/maps').read();"
        "print(len(set(re.findall(r'\\S*/lib[a-z]*omp[^/]*\\.so\\S*', maps))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "1"


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch, elsewhere, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["build"])
    with pytest.raises(BuildError, match="apt-get install g"):
        build.build()
    assert build.main() == 1
    assert "the kernels were not built: no C++ compiler found" in capsys.readouterr().err


def test_what_the_compiler_refuses_is_shown_and_nothing_is_left(monkeypatch, elsewhere):
    built_kernels()
    level = replace(usable_level(), flags=("-march=no-such-processor",))
    monkeypatch.setattr(build, "levels", lambda: (level,))
    with pytest.raises(BuildError, match="no-such-processor"):
        build.build()
    assert list(elsewhere.iterdir()) == []


def test_an_unknown_kind_of_processor(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(BuildError, match="no kernels for a processor of kind 's390x'"):
        build.build()


def test_the_digest_covers_the_sources(monkeypatch, tmp_path):
    before = build.source_digest()
    for file in build.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.source_digest() == before
    (tmp_path / "tile.h").write_text("// changed")
    assert build.source_digest() != before


def test_structures_have_the_size_that_the_library_thinks():
    sizes = built_kernels().structure_sizes()
    assert sizes
    for structure, size in sizes.items():
        assert ctypes.sizeof(structure) == size, structure.__name__


REQUIRED = ["--role=decode", "--name=w", "--model=file:///m", "--bind=h:1", "--http=h:2"]


def test_the_workers_setting():
    assert parse([*REQUIRED, "--keys=k"]).kernels == "auto"
    assert parse([*REQUIRED, "--keys=k", "--kernels=native"]).kernels == "native"
    with pytest.raises(SystemExit):
        parse([*REQUIRED, "--keys=k", "--kernels=fast"])
