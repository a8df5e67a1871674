"""NIXL keeps the contract of the transfer interface, between agents of one process over TCP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock_runtime.transfer.nixl import NixlTransfer
from penstock_runtime.transfer.nixl_settings import NixlSettings
from tests.integration.transfer.contract import CONTRACT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from penstock_runtime.transfer.base import Transfer


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
async def test_contract(promise: Callable[[Transfer], Awaitable[None]]) -> None:
    transfer = NixlTransfer(NixlSettings(devices="lo"))
    try:
        await promise(transfer)
    finally:
        await transfer.close()
