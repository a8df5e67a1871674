"""Whether RDMA can be used, from what the kernel shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.nixl_settings import NixlSettings
from penstock_runtime.transfer.rdma import missing, ucx_transports

if TYPE_CHECKING:
    from pathlib import Path


def device(root: Path, state: str) -> tuple[Path, Path]:
    """Make the directories of one device with one port."""
    sys, dev = root / "sys", root / "dev"
    port = sys / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    dev.mkdir()
    (dev / "uverbs0").touch()
    return sys, dev


def test_a_device_with_an_active_port_can_be_used(tmp_path: Path) -> None:
    assert missing(*device(tmp_path, "4: ACTIVE")) == ""


def test_a_port_that_is_down_is_told(tmp_path: Path) -> None:
    assert "(1: DOWN)" in missing(*device(tmp_path, "1: DOWN"))


def test_no_device_is_told_with_the_remedy(tmp_path: Path) -> None:
    assert "device plugin" in missing(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("rdma", "device", "transports"),
    [
        (False, "cpu", "tcp"),
        (True, "cpu", "rc,ud,tcp"),
        (False, "cuda", "tcp,cuda_copy"),
        (True, "cuda", "rc,ud,tcp,cuda_copy"),
    ],
)
def test_what_ucx_may_use_never_passes_a_fence(rdma: bool, device: str, transports: str) -> None:
    chosen = ucx_transports(rdma=rdma, device=device)
    assert chosen == transports
    assert NixlSettings(transports=chosen).transports == chosen
