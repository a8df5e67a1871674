"""From zero and back: a request wakes what it needs, silence puts it to sleep again."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from e2e.cluster.waiting import until
from e2e.load import ask, question
from e2e.service import MODEL

if TYPE_CHECKING:
    from e2e.service import Service

pytestmark = pytest.mark.timeout(900)
_IDLE_SECONDS = 15


def workers(service: Service) -> int:
    return len(service.items("pods")) - len(service.pods("router"))


async def test_a_request_wakes_prefill_and_decode(service: Service) -> None:
    scaling = {"minReplicas": 0, "maxReplicas": 2, "idleSeconds": _IDLE_SECONDS}
    for role in ("prefill", "decode"):
        del service.spec[role]["replicas"]
        service.spec[role]["autoscaling"] = scaling
    service.apply()
    service.wait_for("Ready")

    until("all workers are asleep", lambda: workers(service) == 0, seconds=180)
    service.wait_for("DecodeReady", reason="ScaledToZero")
    service.wait_for("PrefillReady", reason="ScaledToZero")
    service.wait_for("Ready")

    questions = [question(random.Random(seed)) for seed in range(4)]
    answers = await asyncio.gather(*(ask(service.url, MODEL, asked) for asked in questions))
    assert answers == [asked.answer for asked in questions]
    assert workers(service) >= 3

    until("all workers are asleep again", lambda: workers(service) == 0, seconds=180)
