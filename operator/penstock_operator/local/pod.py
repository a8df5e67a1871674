"""One pod as a process: started, probed, restarted with back-off, ended with grace."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from penstock_operator.local.health import Prober
from penstock_operator.local.logs import LogFile
from penstock_operator.local.processes import Process, exit_reason
from penstock_operator.observed import Pod
from penstock_wire.model_source import FETCHING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from penstock_operator.local.kubelet import Launch
    from penstock_operator.local.logs import Terminal
    from penstock_operator.local.settings import LocalSettings
    from penstock_operator.observed import Fault, PodState, RouterAnswer


class LocalPod:
    """Keeps one process running until told to stop. `on_change` is called when anything changes."""

    def __init__(
        self,
        launch: Launch,
        *,
        settings: LocalSettings,
        client: httpx.AsyncClient,
        terminal: Terminal,
        log_file: Path,
        on_change: Callable[[], None],
    ) -> None:
        self.launch = launch
        self.ready_since: float | None = None
        self._settings = settings
        self._client = client
        self._terminal = terminal
        self._log = LogFile(log_file, settings.log_bytes)
        self._on_change = on_change
        self._process: Process | None = None
        self._prober: Prober | None = None
        self._restarts = 0
        self._ended_because = ""
        """Why the last process ended; empty again once its successor is ready."""
        self._stopping = asyncio.Event()
        self._done = False
        self._task = asyncio.create_task(self._run())

    # --- what others see ----------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process, None between two of them."""
        return self._process.pid if self._process else None

    @property
    def started(self) -> int | None:
        """The process's start time, see `processes.start_time`."""
        return self._process.started if self._process else None

    @property
    def ready(self) -> bool:
        """Serves and is not asked to end."""
        return self.state == "ready"

    @property
    def stopped(self) -> bool:
        """Has ended for good."""
        return self._done

    @property
    def state(self) -> PodState:
        """What it is doing."""
        if self._done:
            return "stopped"
        if self._stopping.is_set():
            return "draining"
        if self._process is None:
            return "waiting" if self._restarts else "pending"
        return "ready" if self._prober and self._prober.health.ready else "starting"

    def observe(self) -> Pod:
        """Return what is known of it."""
        identity, state = self.launch.identity, self.state
        health = self._prober.health if self._prober else None
        body = health.body if health else {}
        details = health.details if health else {}
        message = _text(body.get("message"))
        if state != "ready":
            message = self._ended_because or message or (health.message if health else "")
        links = details.get("groups_ready")
        return Pod(
            name=identity.name,
            role=identity.role,
            workload=identity.workload,
            revision=self.launch.revision,
            group=self.launch.group,
            stage=identity.stage,
            state=state,
            progress=1.0 if state == "ready" else _fraction(body.get("progress")),
            message=message,
            fault=self._fault(state, message),
            restarts=self._restarts,
            transport=_text(details.get("transport")),
            groups_ready=frozenset(map(str, links)) if isinstance(links, list) else None,
        )

    def _fault(self, state: PodState, message: str) -> Fault:
        if state == "draining":
            return ""
        if self._ended_because:
            return "CrashLooping"
        downloading = state == "starting" and message.startswith(FETCHING)
        return "ModelDownloading" if downloading else ""

    def router_answer(self) -> RouterAnswer | None:
        """Return what a router's end-to-end check said last, None if it has not answered."""
        return self._prober.health.answer if self._prober else None

    # --- life ---------------------------------------------------------------------------------

    def stop(self, grace: float) -> None:
        """Ask it to drain; it is killed after `grace` seconds. Asking again shortens the grace."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
        asyncio.get_running_loop().call_later(grace, self.kill)
        self._on_change()

    def kill(self) -> None:
        """End it now."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    def check(self) -> None:
        """Raise what ended the pod's own loop, if something did: that is a defect of ours."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()

    async def wait(self) -> None:
        """Wait until it has ended for good."""
        await self._task

    async def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            await self._run_once()
            if self._stopping.is_set():
                break
            stable = time.monotonic() - began >= self._settings.stable_seconds
            failures = 0 if stable else failures + 1
            self._restarts += 1
            wait = min(
                self._settings.backoff_first * 2 ** max(0, failures - 1),
                self._settings.backoff_most,
            )
            self._say(f"{self._ended_because}; starting again in {wait:g} s")
            self._on_change()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
        self._done = True
        self._log.close()
        self._on_change()

    async def _run_once(self) -> None:
        """Run the process to its end, and say why it ended."""
        process = Process(self.launch.argv, self.launch.env, self._print, self.launch.inherits)
        self._process = process
        self._prober = Prober(
            self.launch,
            self._client,
            fastest=self._settings.probe_seconds,
            on_change=self._health_changed,
        )
        self._on_change()
        if self._stopping.is_set():
            process.terminate()
        probing = asyncio.create_task(self._probe(self._prober, process))
        code = await process.wait()
        probing.cancel()
        verdict = ""
        with contextlib.suppress(asyncio.CancelledError):
            verdict = await probing
        self._process, self._prober = None, None
        self.ready_since = None
        self._ended_because = verdict or exit_reason(code, process.last_line)

    async def _probe(self, prober: Prober, process: Process) -> str:
        """Probe, and kill the process when the probes say so; return what they said."""
        verdict = await prober.run()
        process.kill()
        return verdict

    def _health_changed(self) -> None:
        if self.ready and self.ready_since is None:
            self.ready_since = time.monotonic()
            self._ended_because = ""
        elif not self.ready:
            self.ready_since = None
        self._on_change()

    def _print(self, line: str) -> None:
        self._log.write(line)
        self._terminal.log(self.launch.identity.short, line)

    def _say(self, line: str) -> None:
        self._log.write(f"[penstock] {line}")
        self._terminal.say(f"{self.launch.identity.short}: {line}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _fraction(value: Any) -> float:
    return min(1.0, max(0.0, float(value))) if isinstance(value, int | float) else 0.0
