"""HTTP probes of one pod: started, then ready and alive, as the kubelet judges it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from penstock_operator.observed import RouterAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock_operator.local.kubelet import Launch, Probe

_LONGEST_ANSWER = 64 * 1024


@dataclass(slots=True)
class Health:
    """What the probes found last."""

    started: bool = False
    ready: bool = False
    body: dict[str, Any] = field(default_factory=dict)
    """Of the last readiness answer, empty if it was not a JSON object."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of a worker's /state, while it is ready."""
    message: str = ""
    """Why the last readiness probe did not succeed."""
    answer: RouterAnswer | None = None
    """What a router's own end-to-end check said."""


class Prober:
    """Probes a pod until it must be restarted."""

    def __init__(
        self,
        launch: Launch,
        client: httpx.AsyncClient,
        *,
        fastest: float,
        on_change: Callable[[], None],
    ) -> None:
        self.health = Health()
        self._launch = launch
        self._client = client
        self._fastest = fastest
        self._on_change = on_change

    async def run(self) -> str:
        """Probe until the pod has to be restarted; return why. Cancel it when the pod ends."""
        reason = await self._wait_started()
        if reason:
            return reason
        watches = [
            asyncio.create_task(self._watch_readiness()),
            asyncio.create_task(self._watch_liveness()),
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _wait_started(self) -> str:
        """Wait for the first answer, as long as the start-up probe allows."""
        probe = self._launch.startup
        limit = probe.period * probe.failures
        try:
            async with asyncio.timeout(limit):
                alive = False
                while not alive:
                    alive, _, _ = await self._ask(probe)
                    await asyncio.sleep(0 if alive else min(probe.period, self._fastest))
        except TimeoutError:
            return f"no answer from {probe.url} within {limit:.0f} s of its start"
        self.health.started = True
        self._on_change()
        return ""

    async def _watch_liveness(self) -> str:
        probe = self._launch.liveness
        failures = 0
        while failures < probe.failures:
            await asyncio.sleep(probe.period)
            alive, _, message = await self._ask(probe)
            failures = 0 if alive else failures + 1
        return f"not alive after {failures} probes: {message}"

    async def _watch_readiness(self) -> str:
        """Note every change, for ever: an unready pod is not restarted for it."""
        probe = self._launch.readiness
        failures = 0
        while True:
            ready, body, message = await self._ask(probe)
            failures = 0 if ready else failures + 1
            # One lost answer of a ready pod is not news, but an answer that says no is.
            if ready or body or failures >= probe.failures:
                details = await self._details() if ready else {}
                answer = await self._answer()
                self._note(Health(True, ready, body, details, message, answer))
            settled = self.health.ready
            await asyncio.sleep(probe.period if settled else min(probe.period, self._fastest))

    async def _details(self) -> dict[str, Any]:
        if not self._launch.control:
            return {}
        _, body, _ = await self._ask_url(
            f"http://{self._launch.http}/state", self._launch.readiness.timeout
        )
        return body

    async def _answer(self) -> RouterAnswer | None:
        """Ask a router whether a request would succeed."""
        probe = self._launch.end_to_end
        if probe is None:
            return None
        ready, body, message = await self._ask(probe)
        if ready:
            return RouterAnswer(True, "its end-to-end check passed")
        return RouterAnswer(False, _why_not(body) or message)

    def _note(self, health: Health) -> None:
        if health != self.health:
            self.health = health
            self._on_change()

    async def _ask(self, probe: Probe) -> tuple[bool, dict[str, Any], str]:
        return await self._ask_url(probe.url, probe.timeout)

    async def _ask_url(self, url: str, timeout_s: float) -> tuple[bool, dict[str, Any], str]:
        """Return whether the answer was 2xx, its JSON object, and what to tell if it was not."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.get(url)
        except (httpx.HTTPError, TimeoutError) as error:
            return False, {}, f"{url} does not answer: {error or type(error).__name__}"
        body = _json_object(response.content)
        if response.is_success:
            return True, body, ""
        return False, body, f"{url} answers {response.status_code}"


def _why_not(body: dict[str, Any]) -> str:
    """Return the reasons in a router's answer, in whichever of the usual fields they are."""
    reasons = body.get("reasons")
    if isinstance(reasons, list) and reasons:
        return "; ".join(map(str, reasons))
    found = body.get("reason") or body.get("message")
    return found if isinstance(found, str) else ""


def _json_object(content: bytes) -> dict[str, Any]:
    if len(content) > _LONGEST_ANSWER:
        return {}
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
