"""What workers and routers say of themselves over HTTP; untrusted, so typed and bounded."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import aiohttp

from penstock_operator import labels
from penstock_operator.cluster.pods import WorkerAnswer, address, role_of, state_of
from penstock_operator.observed import RouterAnswer
from penstock_wire.names import bracketed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock_operator.cluster.children import Child

_LONGEST_ANSWER = 64 * 1024
_LONGEST_TEXT = 1024
Depth: TypeAlias = Literal["routers", "everything"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterPod:
    """What one router pod said of the whole path behind it."""

    name: str
    ready: bool = False
    message: str = ""
    idle_seconds: float = 0.0
    accepting: bool = False
    """The cluster sends requests to it."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the pods of one service said, workers by the pod's uid."""

    workers: dict[str, WorkerAnswer] = field(default_factory=dict)
    routers: tuple[RouterPod, ...] = ()
    silent_routers: int = 0
    """Routers that run and did not answer."""

    @property
    def idle_seconds(self) -> float:
        """How long no router has had a request; 0 while one of them cannot tell."""
        if self.silent_routers or not self.routers:
            return 0.0
        return min(router.idle_seconds for router in self.routers)

    def differ(self, other: Answers) -> bool:
        """Whether they tell something else; growing idle times are not news."""
        return self._news() != other._news()

    def _news(self) -> object:
        routers = [(r.name, r.ready, r.message, r.accepting) for r in self.routers]
        return self.workers, routers, self.silent_routers


class Poller:
    """Asks pods, not more than `parallel` at once.

    Args:
        session: the HTTP client.
        seconds: for one answer. Pods are near; one that needs longer is stuck, and says so.
        parallel: requests at once, of all services together.
    """

    def __init__(
        self, session: aiohttp.ClientSession, *, seconds: float = 1.5, parallel: int = 64
    ) -> None:
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=seconds)
        self._slots = asyncio.Semaphore(parallel)

    async def ask(
        self, pods: Sequence[Child], before: Answers, *, router_port: int, depth: Depth
    ) -> Answers:
        """Return what the pods say. With depth "routers", workers keep their earlier answers."""
        running = [pod for pod in pods if address(pod)]
        routers = [pod for pod in running if role_of(pod) == "router"]
        workers = [pod for pod in running if role_of(pod) in ("prefill", "decode")]
        asked = workers if depth == "everything" else []
        told_routers, told_workers = await asyncio.gather(
            asyncio.gather(*(self._router(pod, router_port) for pod in routers)),
            asyncio.gather(*(self._worker(pod) for pod in asked)),
        )
        kept = {pod.uid: before.workers[pod.uid] for pod in workers if pod.uid in before.workers}
        fresh = zip((pod.uid for pod in asked), told_workers, strict=True)
        answered = tuple(router for router in told_routers if router is not None)
        return Answers(
            workers={**kept, **{uid: told for uid, told in fresh if told is not None}},
            routers=answered,
            silent_routers=len(routers) - len(answered),
        )

    async def _router(self, pod: Child, port: int) -> RouterPod | None:
        found = await self._json(f"http://{bracketed(address(pod))}:{port}/ready")
        if found is None:
            return None
        reasons = found.get("reasons")
        listed = reasons if isinstance(reasons, list) else []
        why = "; ".join(_text(r) for r in listed if _text(r)) or _text(found.get("message"))
        ready = found.get("ready") is True
        return RouterPod(
            name=pod.name,
            ready=ready,
            message=why or ("its end-to-end check passed" if ready else "it gives no reason"),
            idle_seconds=_number(found.get("idle_seconds")),
            accepting=state_of(pod) == "ready",
        )

    async def _worker(self, pod: Child) -> WorkerAnswer | None:
        url = f"http://{bracketed(address(pod))}:{labels.HTTP_PORT}"
        if state_of(pod) == "starting":
            found = await self._json(f"{url}/readyz")
            return None if found is None else worker_answer(found, {})
        found = await self._json(f"{url}/state")
        return None if found is None else worker_answer({}, found)

    async def _json(self, url: str) -> dict[str, Any] | None:
        """Return a JSON object, None if there is no answer or one that is something else."""
        try:
            async with (
                self._slots,
                self._session.get(url, timeout=self._timeout, allow_redirects=False) as response,
            ):
                text = await response.content.read(_LONGEST_ANSWER)
                while len(text) < _LONGEST_ANSWER and (more := await response.content.readany()):
                    text += more
            found = json.loads(text) if len(text) < _LONGEST_ANSWER else None
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


def router_answer(answers: Answers) -> RouterAnswer | None:
    """Return what the routers say together: one that clients reach and that is ready is enough."""
    reached = [router for router in answers.routers if router.accepting]
    ready = next((router for router in reached if router.ready), None)
    if ready is not None:
        return RouterAnswer(True, ready.message)
    told = next(iter(reached or answers.routers), None)
    if told is None:
        return None
    if told.ready:
        return RouterAnswer(False, f"{told.name} is ready, and the cluster does not send to it yet")
    return RouterAnswer(False, f"{told.name}: {told.message}", holds=bool(reached))


def worker_answer(readyz: dict[str, Any], state: dict[str, Any]) -> WorkerAnswer:
    """Return what a worker's /readyz and /state say, each empty if it was not asked."""
    links = state.get("groups_ready")
    pages = state.get("pages")
    counts = pages if isinstance(pages, dict) else {}
    held = _number(counts.get("resident")) + _number(counts.get("granted"))
    load = _number(state["running"]) if "running" in state else held or _number(state.get("busy"))
    return WorkerAnswer(
        progress=min(1.0, max(0.0, _number(readyz.get("progress")))),
        message=_text(readyz.get("message")),
        transport=_text(state.get("transport")),
        groups_ready=frozenset(map(_text, links)) if isinstance(links, list) else None,
        load=int(load),
    )


def _text(value: Any) -> str:
    return value[:_LONGEST_TEXT] if isinstance(value, str) else ""


def _number(value: Any) -> float:
    """Return a finite number, 0 for anything else."""
    if isinstance(value, int | float) and abs(value) < 1e15:
        return float(value)
    return 0.0
