"""Activations from one stage to the next, over memory."""

from __future__ import annotations

import asyncio

import pytest
import torch

from penstock_runtime.engine.ring import ActivationRing, RingSettings
from penstock_runtime.errors import PipelineBroken
from penstock_runtime.transfer.base import PeerLost
from penstock_runtime.transfer.in_memory import Fabric, InMemoryTransfer

SLOTS, TOKENS, HIDDEN = 3, 8, 4
QUICK = RingSettings(connect_seconds=0.3, probe_seconds=0.02)


def ring(fabric: Fabric, name: str, slots: int = SLOTS) -> ActivationRing:
    shape = (slots, TOKENS, HIDDEN)
    return ActivationRing(
        InMemoryTransfer(fabric), name, torch.zeros(shape), torch.zeros(shape), QUICK
    )


async def pair(fabric: Fabric) -> tuple[ActivationRing, ActivationRing]:
    first, second = ring(fabric, "first"), ring(fabric, "second")
    addresses = await asyncio.gather(first.prepare(1), second.prepare(1))
    await asyncio.gather(first.form(None, addresses[1]), second.form(addresses[0], None))
    return first, second


def hidden(number: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.full((tokens, HIDDEN), float(number))


async def test_hand_overs_arrive_in_order_and_whole() -> None:
    first, second = await pair(Fabric())
    # More than the ring has slots: later ones wait for credits, several of them at once.
    sends = [asyncio.create_task(first.send(hidden(i, 1 + i % TOKENS))) for i in range(20)]
    for i in range(20):
        got = await asyncio.wait_for(second.receive(1 + i % TOKENS), 5)
        assert torch.equal(got, hidden(i, 1 + i % TOKENS))
    await asyncio.gather(*sends)
    await asyncio.gather(first.close(), second.close())


async def test_a_full_ring_waits_and_overwrites_nothing() -> None:
    first, second = await pair(Fabric())
    sends = [asyncio.create_task(first.send(hidden(i))) for i in range(SLOTS + 2)]
    done, waiting = await asyncio.wait(sends, timeout=0.2)
    assert (len(done), len(waiting)) == (SLOTS, 2)
    for i in range(SLOTS + 2):
        assert torch.equal(await second.receive(TOKENS), hidden(i))
    await asyncio.gather(*sends)
    await asyncio.gather(first.close(), second.close())


async def test_the_end_of_an_epoch_wakes_who_waits() -> None:
    first, second = await pair(Fabric())
    receiving = asyncio.create_task(second.receive(TOKENS))
    sends = [asyncio.create_task(first.send(hidden(i))) for i in range(SLOTS + 1)]
    assert torch.equal(await receiving, hidden(0))
    blocked = asyncio.create_task(first.send(hidden(9)))
    await asyncio.wait(sends, timeout=0.2)
    waiting = [asyncio.create_task(second.receive(TOKENS)) for _ in range(1)]
    await asyncio.gather(first.close(), second.close())
    with pytest.raises(PipelineBroken):
        await blocked
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(r, torch.Tensor | PipelineBroken) for r in results)


async def test_an_epoch_may_end_before_its_last_credit_has_begun() -> None:
    """A coroutine that nobody awaited would be a warning, and warnings are errors here."""
    first, second = await pair(Fabric())
    await first.send(hidden(1))
    await second.receive(TOKENS)
    await second.close()
    await first.close()


async def test_a_new_epoch_starts_clean() -> None:
    fabric = Fabric()
    first, second = await pair(fabric)
    await first.send(hidden(7))
    addresses = await asyncio.gather(first.prepare(2), second.prepare(2))
    await asyncio.gather(first.form(None, addresses[1]), second.form(addresses[0], None))
    await first.send(hidden(8))
    assert torch.equal(await second.receive(TOKENS), hidden(8))
    await asyncio.gather(first.close(), second.close())


async def test_a_silent_neighbour_is_not_joined() -> None:
    fabric = Fabric()
    first, second = ring(fabric, "first"), ring(fabric, "second")
    await first.prepare(1)
    address = await second.prepare(1)
    with pytest.raises(PeerLost, match="nonce"):
        await first.form(None, address)  # second never connects back
    await asyncio.gather(first.close(), second.close())


async def test_rings_of_another_shape_are_refused() -> None:
    fabric = Fabric()
    first, second = ring(fabric, "first"), ring(fabric, "second", SLOTS + 1)
    await first.prepare(1)
    with pytest.raises(PeerLost, match="same settings"):
        await first.form(None, await second.prepare(1))
    await asyncio.gather(first.close(), second.close())
