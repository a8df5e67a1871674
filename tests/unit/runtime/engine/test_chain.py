"""Stage 0 forms epochs: with every stage that is there, and no longer than one is lost."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import msgspec

from penstock_runtime.engine.chain import Chain, ChainSettings, Member
from penstock_wire.messages import Form, Formed, Hello, Message, Prepare, Prepared, RingAddress
from penstock_wire.sockets import ControlClient, LinkState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

RING = RingAddress(agent=b"", base=0, slot_bytes=1, slots=1)


class Stage:
    """A stage that answers at once, unless it is silent. Stands for client and member alike."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.hello = Hello(
            role="prefill",
            name=f"p-{stage}",
            boot_id="b",
            stage=stage,
            layers=(2.5, 4),
            pages=8,
        )
        self.up = True
        self.silent = False
        self.asked = asyncio.Event()
        self.reply: Callable[[Message], None] = lambda _: None

    def send(self, message: Message) -> None:
        self.asked.set()
        if self.silent:
            return
        if isinstance(message, Prepare):
            self.reply(Prepared(epoch=message.epoch, stage=self.stage, ring=RING))
        elif isinstance(message, Form):
            self.reply(Formed(epoch=message.epoch, stage=self.stage))

    async def handle(self, message: Prepare | Form, reply: Callable[[Message], None]) -> None:
        self.reply = reply
        self.send(message)


class Group:
    """A chain of two stages, and the epochs that it formed."""

    def __init__(self) -> None:
        self.other = Stage(1)
        self.formed: asyncio.Queue[int] = asyncio.Queue()
        self.chain = Chain(
            [cast("ControlClient", self.other)],
            cast("Member", Stage(0)),
            layers=(0, 2.5),
            pages=8,
            on_formed=lambda epoch, _pages, _replaced: self.formed.put_nowait(epoch),
            on_broken=lambda _: None,
            settings=ChainSettings(form_seconds=30, retry_seconds=0),
        )
        self.other.reply = lambda m: self.chain.answer(cast("Prepared | Formed", m))


@asynccontextmanager
async def group() -> AsyncIterator[Group]:
    made = Group()
    task = asyncio.create_task(made.chain.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_stage_lost_while_an_epoch_forms_ends_the_attempt_at_once() -> None:
    """Its data path breaks first, so the next epoch is forming when its link is lost."""
    async with group() as g, asyncio.timeout(5):
        assert await g.formed.get() == 1
        g.other.silent = True
        g.other.asked.clear()
        g.chain.broken("the data path to stage 1 is lost")
        await g.other.asked.wait()
        g.other.up = False
        g.chain.link_changed(1, LinkState.LOST, g.other.hello)
        g.other.up, g.other.silent = True, False
        g.chain.link_changed(1, LinkState.READY, g.other.hello)
        assert await g.formed.get() == 3, "without waiting for the answer of the one that is gone"


async def test_a_loss_before_an_epoch_forms_does_not_end_it() -> None:
    async with group() as g, asyncio.timeout(5):
        assert await g.formed.get() == 1
        g.chain.link_changed(1, LinkState.LOST, g.other.hello)
        assert not g.chain.formed
        g.chain.link_changed(1, LinkState.READY, g.other.hello)
        assert await g.formed.get() == 2


class Refusal(logging.Handler):
    """Hears why an epoch was not formed."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        if "was not formed" in record.msg:
            self.heard.put_nowait(record.getMessage())


async def test_stages_whose_layers_do_not_join_form_no_epoch() -> None:
    refusal, log = Refusal(), logging.getLogger("penstock_runtime.engine.chain")
    log.addHandler(refusal)
    try:
        async with group() as g, asyncio.timeout(5):
            assert await g.formed.get() == 1
            assert g.chain.layers_per_stage == [2.5, 1.5]
            fitting = g.other.hello
            g.other.hello = msgspec.structs.replace(fitting, layers=(2, 4))
            g.chain.broken("stage 1 was replaced")
            text = await refusal.heard.get()
            assert "stage 1 begins at layer 2, and the stage before it ends at 2.5" in text
            assert "--layers-per-stage" in text
            assert not g.chain.formed
            g.other.hello = fitting
            assert await g.formed.get() > 1
    finally:
        log.removeHandler(refusal)
