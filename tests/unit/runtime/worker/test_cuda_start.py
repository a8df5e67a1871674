"""How a worker for CUDA starts: memory, kernels and graphs, and what it says when it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from penstock_runtime import cuda_device
from penstock_runtime.attention.flashinfer import FlashInferAttention
from penstock_runtime.cuda_device import find_device
from penstock_runtime.errors import ConfigurationError
from penstock_runtime.kvcache.tensors import PoolTensor
from penstock_runtime.memory import out_of_memory
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.transformer import attention_shape
from penstock_runtime.worker import prepare
from penstock_runtime.worker.settings import KvMemory, parse
from tests.integration.system import checkpoint
from tests.unit.runtime import fake_flashinfer
from tests.unit.runtime.model.checkpoints import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from penstock_runtime.engine.cuda_graphs import DecodeGraphs
    from penstock_runtime.model.transformer import Transformer

CPU = torch.device("cpu")
REQUIRED = [
    *("--role", "decode", "--name", "d", "--model", "file:///m", "--keys", "/k"),
    *("--bind", "127.0.0.1:1", "--http", "127.0.0.1:2"),
]


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ([], KvMemory(amount=2**30)),
        (["--device", "cuda"], KvMemory(share=0.9)),
        (["--device", "cuda", "--kv-memory", "40Gi"], KvMemory(amount=40 * 2**30)),
        (["--device", "cuda", "--kv-memory", "62.5%"], KvMemory(share=0.625)),
        (["--kv-memory", "1.5k"], KvMemory(amount=1500)),
    ],
)
def test_kv_memory_is_an_amount_or_a_share_of_the_device(
    arguments: list[str], memory: KvMemory
) -> None:
    assert parse([*REQUIRED, *arguments]).kv_memory == memory


def test_a_share_of_host_memory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"50% is a share of a GPU's memory.*name an amou"):
        parse([*REQUIRED, "--kv-memory", "50%"])


@pytest.mark.parametrize("text", ["0%", "101%", "much", "5T", "-1"])
def test_nonsense_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*REQUIRED, f"--kv-memory={text}"])
    assert text in capsys.readouterr().err


def test_only_a_share_asks_the_device() -> None:
    def ask() -> int:
        raise AssertionError("the amount is known")

    assert KvMemory(amount=5).of(ask) == 5
    assert KvMemory(share=0.5).of(lambda: 1001) == 500


# --- the device ----------------------------------------------------------------------------------


def test_a_missing_device_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigurationError, match=r"nvidia-smi.*resources\.gpu.*--device cpu"):
        find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigurationError, match="has no CUDA; install"):
        find_device("cuda")


def test_lack_of_device_memory_is_explained() -> None:
    with (
        pytest.raises(ConfigurationError, match="The weights: the GPU has not enough memory; buy"),
        out_of_memory("The weights", "buy more"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore lines")


# --- preparation, over the stand-in --------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path: Path = checkpoint.make(tmp_path_factory.mktemp("model"))
    config = ModelConfig.from_directory(path)
    shape = attention_shape(config, torch.float32, CPU)
    return whole_model(path, attention=FlashInferAttention(fake_flashinfer, shape, CPU))


def take(model: Transformer, memory: KvMemory, free: int = 0) -> PoolTensor:
    layout = model.config.kv_layout(layers=(0, model.num_layers), page_size=8, dtype=model.dtype)
    pages = prepare.count_pages(memory, lambda: free, layout.page_bytes)
    return PoolTensor(layout, pages, dtype=model.dtype, device=CPU)


def test_a_share_is_of_what_the_weights_leave(model: Transformer) -> None:
    page = take(model, KvMemory(amount=2**20)).layout.page_bytes
    assert take(model, KvMemory(share=0.5), 20 * page).pages == 10
    with pytest.raises(ConfigurationError, match="--kv-memory 5% holds 1 pages"):
        take(model, KvMemory(share=0.05), 20 * page)


def test_free_bytes_gives_caches_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [7]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[-1], 9))
    assert cuda_device.free_bytes(CPU) == 8


@pytest.mark.parametrize("tokens", [2, 3, 50])
@pytest.mark.parametrize("embed", [True, False])
@torch.inference_mode()
def test_warming_up_computes_the_largest_step(model: Transformer, tokens: int, embed: bool) -> None:
    # More tokens than the pool holds: the rows may share pages, nobody reads them.
    pool = take(model, KvMemory(amount=2**15))
    prepare.warm_up(model, pool, tokens=tokens, embed=embed, head=True)
    assert torch.isfinite(pool.tensor).all()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "step of 16 tokens.*--max-chunk-tokens"),
        (RuntimeError("Could not find nvcc"), "needs nvcc of the CUDA toolkit.*not find nvcc"),
        (FileNotFoundError("no ninja"), "a C.. compiler and a HOME that can be written: no ninja"),
    ],
)
def test_a_step_that_cannot_be_computed_is_explained(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ConfigurationError, match=message):
        prepare.warm_up(
            model, take(model, KvMemory(amount=2**20)), tokens=16, embed=True, head=True
        )


def once(function: Callable[[], None]) -> Callable[[], None]:
    function()
    return function


@torch.inference_mode()
def test_graphs_are_captured_where_the_attention_can_be(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def capture() -> DecodeGraphs | None:
        return prepare.capture_graphs(
            model,
            take(model, KvMemory(amount=2**20)),
            max_batch=3,
            max_tokens=40,
            capture=once,
            progress=lambda done, total: seen.append((done, total)),
        )

    assert capture() is not None
    assert seen == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(model, "attention", object())
    assert capture() is None
