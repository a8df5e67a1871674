"""The compute thread has the cores; the event loop's thread has one."""

from __future__ import annotations

import asyncio
import threading

import torch

from penstock_runtime.engine.compute import Compute, leave_cores_to_compute


def test_each_thread_has_its_own_number_of_threads() -> None:
    found: list[int] = []

    async def both() -> None:
        leave_cores_to_compute()
        compute = Compute(3)
        found.append(await compute.run(torch.get_num_threads))
        compute.close()
        found.append(torch.get_num_threads())

    # On a thread that ends with the test: the number stays with it.
    loop = threading.Thread(target=lambda: asyncio.run(both()))
    loop.start()
    loop.join(20)
    assert found == [3, 1]
