"""End-to-end readiness: proved by one-token probes through the very path of a request.

A canary is run for each decode worker's boot, and when prefill is required again for each pair of a
decode worker and a prefill group, with the group forced, so that the KV really travelled. Every
canary has its own salt: nothing it computes is found in a cache.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from penstock_router.calls import Lost
from penstock_wire.messages import Failed, Generate, Sampling, pack_tokens
from penstock_wire.rhythm import until_next
from penstock_wire.sockets import LinkDown

if TYPE_CHECKING:
    from penstock_router.wake import SleepingRole, Waker
    from penstock_router.workers import Fleet, Worker

log = logging.getLogger(__name__)

_ROLES: tuple[SleepingRole, ...] = ("decode", "prefill")
_RETRY_SECONDS = 1.0
"""Between a canary that failed and the next one: a worker's recovery is noticed within a second."""
_PROMPT_TOKENS = 8
"""Of a canary: more than one, so that something is left to prefill for a group."""


@dataclass(frozen=True, slots=True)
class Path:
    """A path that a request can take: boots, not names, because a restarted peer is a new peer."""

    decode: str
    decode_boot: str
    group: str = ""
    group_boot: str = ""


class CanaryFailed(Exception):  # noqa: N818 - it names the state
    """A probe did not come back with a token; the message says why."""


class Readiness:
    """Knows which paths work.

    Args:
        fleet: the workers.
        waker: tells which roles are scaled to zero.
        timeout: seconds that a canary may take.
        token: a token id that the model knows.
    """

    def __init__(self, fleet: Fleet, waker: Waker, *, timeout: float, token: int = 0) -> None:
        self._fleet = fleet
        self._waker = waker
        self._timeout = timeout
        self._token = token
        self._passed: set[Path] = set()
        self._failures: dict[Path, str] = {}
        self._running: dict[Path, asyncio.Task[None]] = {}
        self._was_ready = False
        self.draining = False

    def accepting(self) -> bool:
        """Return whether connections should come here.

        Once the router has been ready, a worker's crash is no reason to send clients away: it
        holds their requests until there is one again.
        """
        return not self.draining and (self._was_ready or not self.reasons())

    def waking(self) -> bool:
        """Return whether a role is on its way up from zero."""
        return any(self._waker.waking(role) for role in _ROLES)

    def message(self) -> str:
        """Return what a router that is ready has to say."""
        asleep = [role for role in _ROLES if self._waker.asleep(role)]
        if asleep:
            return f"scaled to zero: {' and '.join(asleep)}; the next request wakes them"
        return "requests are answered"

    def reasons(self) -> list[str]:
        """Return why a request would not succeed now; nothing means ready."""
        reasons = self._reasons()
        self._was_ready = self._was_ready or not reasons
        return reasons

    def _reasons(self) -> list[str]:
        if self.draining:
            return ["the router is draining"]
        if self._waker.asleep("decode"):
            return []  # a request is held, wakes it, and is answered
        complete = [path for path in self._paths() if self._complete(path)]
        if any(path in self._passed for path in complete):
            return []
        if not complete:
            return [*self._sleep_reasons(), self._missing()]
        return [
            f"the canary of {_name(path)} {self._failures.get(path, 'has not come back yet')}"
            for path in complete
        ]

    def _sleep_reasons(self) -> list[str]:
        found = []
        for role in _ROLES:
            if self._waker.waking(role):
                found.append(f"{role} was scaled to zero and is waking")
            if problem := self._waker.problem(role):
                found.append(f"whether {role} is scaled to zero is not known: {problem}")
        return found

    async def run(self) -> None:
        """Probe new paths for ever."""
        try:
            while True:
                self._follow()
                self.reasons()  # notes the first time that there are none
                await self._fleet.changed(until_next(_RETRY_SECONDS))
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _follow(self) -> None:
        """Forget paths that are gone, and probe those that are new."""
        paths = set(self._paths())
        self._passed &= paths
        self._failures = {path: why for path, why in self._failures.items() if path in paths}
        for path in paths - self._passed - self._running.keys():
            task = asyncio.create_task(self._probe(path), name=f"canary {_name(path)}")
            self._running[path] = task
            task.add_done_callback(partial(self._ended, path))

    def _ended(self, path: Path, task: asyncio.Task[None]) -> None:
        del self._running[path]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the canary of %s broke", _name(path), exc_info=error)

    def _complete(self, path: Path) -> bool:
        """Return whether a request could take this path from end to end.

        While prefill sleeps or wakes, decode workers answer alone.
        """
        return (
            bool(path.group)
            or not self._fleet.require_prefill
            or self._waker.asleep("prefill")
            or self._waker.waking("prefill")
        )

    def _paths(self) -> list[Path]:
        decodes = self._fleet.decode_workers()
        paths = [Path(worker.name, worker.boot_id) for worker in decodes]
        if self._fleet.require_prefill:
            groups = self._fleet.prefill_groups()
            paths += [
                Path(worker.name, worker.boot_id, name, groups[name].boot_id)
                for worker in decodes
                for name in (worker.load.groups_ready if worker.load else ())
                if name in groups
            ]
        return paths

    def _missing(self) -> str:
        listed = [w for w in self._fleet.workers if w.endpoint.role == "decode"]
        if not listed:
            problem = self._fleet.discovery_problem
            return "no decode worker is listed by discovery" + (f": {problem}" if problem else "")
        if not self._fleet.decode_workers():
            return "no decode worker is ready: " + ", ".join(_state(worker) for worker in listed)
        stages = [w for w in self._fleet.workers if w.endpoint.role == "prefill"]
        states = ", ".join(f"{w.endpoint.group}: {_state(w)}" for w in stages) or "none is listed"
        return f"no decode worker has links to all stages of a ready prefill group ({states})"

    async def _probe(self, path: Path) -> None:
        """Run one canary; after a failure wait a moment, so that it is not tried in a loop."""
        try:
            await self._canary(path)
        except (CanaryFailed, LinkDown) as error:
            log.warning("the canary of %s failed: %s", _name(path), error)
            self._failures[path] = f"failed: {error}"
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            log.info("the canary of %s came back", _name(path))
            self._passed.add(path)
            self._failures.pop(path, None)

    async def _canary(self, path: Path) -> None:
        worker = self._fleet.worker(path.decode)
        call = worker.calls.begin(
            Generate(
                request_id=f"canary-{secrets.token_hex(8)}",
                tokens=pack_tokens([self._token] * _PROMPT_TOKENS),
                sampling=Sampling(seed=0, temperature=0.0, max_tokens=1),
                group=path.group,
                salt=secrets.token_bytes(16),
                force_group=bool(path.group),
            )
        )
        deadline = time.monotonic() + self._timeout
        try:
            while True:
                answer = await call.get(max(0.0, deadline - time.monotonic()))
                if isinstance(answer, Lost):
                    raise CanaryFailed(answer.reason)
                if isinstance(answer, Failed):
                    raise CanaryFailed(f"{answer.code}: {answer.message}")
                if answer.tokens or answer.finish:
                    return
        except TimeoutError:
            raise CanaryFailed(f"no token within {self._timeout:g} s") from None
        finally:
            call.close()
            self._fleet.release(worker)


def _name(path: Path) -> str:
    return f"{path.decode} with prefill group {path.group}" if path.group else path.decode


def _state(worker: Worker) -> str:
    state = worker.load.state if worker.load is not None else worker.link.state.value
    return f"{worker.name} is {state}"
