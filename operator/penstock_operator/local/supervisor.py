"""The local executor's loop: what is wanted against what runs, until told to end.

Level-triggered. A pass reads desired.json, observes every process, asks the planner for the next
step, carries it out, lets pods follow, and writes what was seen. Anything that changes wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx

from penstock_operator import labels, podspec
from penstock_operator.errors import ServiceFailed, StateError
from penstock_operator.local.desired import (
    Desired,
    api_key_file,
    local_targets,
    read_desired,
    write_desired,
)
from penstock_operator.local.fleet import Fleet
from penstock_operator.local.kubelet import Surroundings, threads_for_workers
from penstock_operator.local.network import LoopbackNetwork, listen_for_api
from penstock_operator.local.processes import kill_leftover
from penstock_operator.local.progress import ProgressTeller
from penstock_operator.local.state import write_private
from penstock_operator.local.tables import example_request
from penstock_operator.planner import plan
from penstock_operator.status import Observation, compute_status, transitions
from penstock_wire.keys import Keys

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from penstock_operator.api import InferenceService, Status
    from penstock_operator.local.logs import Terminal
    from penstock_operator.local.pod import LocalPod
    from penstock_operator.local.settings import LocalSettings
    from penstock_operator.local.state import StateDir

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Supervisor:
    """Runs one service. `run` is to be called once, from the main thread's event loop."""

    def __init__(
        self,
        service: InferenceService,
        state: StateDir,
        settings: LocalSettings,
        terminal: Terminal,
    ) -> None:
        self._first = service
        self._state = state
        self._settings = settings
        self._terminal = terminal
        self._wake = asyncio.Event()
        self._ending = asyncio.Event()
        self._killing = False
        self._desired: Desired | None = None
        self._desired_stamp: tuple[int, int] | None = None
        self._status: Status | None = None
        self._written: list[dict[str, object]] | None = None
        self._secrets: dict[str, Path] = {}
        self._trouble = ""
        self._url = ""
        self._progress = ProgressTeller(terminal)

    async def run(self) -> None:
        """Run the service until SIGINT, SIGTERM or SIGHUP; nothing is left behind.

        Raises AlreadyRunning, PortInUse, NoLoopbackNetwork or StateError before anything starts,
        ServiceFailed if a process could not be ended.
        """
        with self._state.owned():
            self._clean_up_after_crash()
            first = Desired(manifest=self._first, scaled={}, generation=1)
            write_desired(self._state, first)
            self._read_desired()
            port = self._settings.port or self._service.spec.router.port
            with listen_for_api(self._settings.host, port) as listener:
                self._url = local_url(self._settings.host, port)
                await self._run_here(listener)

    async def _run_here(self, listener: socket.socket) -> None:
        """Run the service at the API's listening socket, on a loopback network of its own."""
        network = LoopbackNetwork.claim(self._state.name, (labels.CONTROL_PORT, labels.HTTP_PORT))
        try:
            Keys.generate().save(self._state.keys)
            async with httpx.AsyncClient(trust_env=False) as client:
                fleet = Fleet(
                    state=self._state,
                    settings=self._settings,
                    network=network,
                    client=client,
                    terminal=self._terminal,
                    on_change=self._wake.set,
                )
                await self._run_fleet(fleet, listener)
        finally:
            network.close()
            self._forget()

    @property
    def _service(self) -> InferenceService:
        assert self._desired is not None
        return self._desired.service

    # --- the loop -----------------------------------------------------------------------------

    async def _run_fleet(self, fleet: Fleet, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        handled = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup stays
        for number in handled:
            loop.add_signal_handler(number, self._on_signal)
        try:
            while not self._ending.is_set():
                self._wake.clear()
                try:
                    self._step(fleet, listener)
                except StateError as error:  # a full disk must not end what serves
                    self._complain(str(error))
                await self._pause()
        finally:
            # From here on clients are refused, not kept waiting for nobody.
            listener.close()
            await self._end(fleet)
            for number in handled:
                loop.remove_signal_handler(number)

    async def _pause(self) -> None:
        """Wait until something changes, and a moment more for what changes with it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._settings.tick_seconds)
            await asyncio.sleep(0.01)

    def _complain(self, trouble: str) -> None:
        """Tell of trouble that passes or stays, but once."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._terminal.say(trouble)

    def _step(self, fleet: Fleet, listener: socket.socket) -> None:
        """Make one pass."""
        try:
            self._read_desired()
        except StateError as error:
            self._complain(f"{error}; going on with what was wanted before")
        service = self._service
        for pod in fleet.pods():
            pod.check()
        fleet.apply(service, plan(local_targets(service), fleet.workloads()))
        fleet.reconcile(service, self._surroundings(service, listener))
        fleet.publish(service)
        self._report(fleet, service)

    def _read_desired(self) -> None:
        """Take in what commands have written since the last time."""
        try:
            stat = self._state.desired_file.stat()
        except OSError as error:
            raise StateError(f"{self._state.desired_file} cannot be read: {error}") from error
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp == self._desired_stamp:
            return
        self._desired_stamp = stamp
        self._desired = read_desired(self._state)
        self._secrets = self._local_secrets(self._desired.service)

    def _report(self, fleet: Fleet, service: InferenceService) -> None:
        """Write what is seen, when it differs from what was written."""
        assert self._desired is not None
        router = fleet.router()
        observation = Observation(
            targets=local_targets(service),
            workloads=[w for w in fleet.workloads() if w.replicas],
            pods=[pod.observe() for pod in fleet.pods()],
            router=router.router_answer() if router else None,
            model=service.spec.model.served_name,
            url=self._url,
        )
        status = compute_status(
            observation,
            generation=self._desired.generation,
            previous=self._status,
            now=datetime.now(UTC).replace(microsecond=0),
        )
        self._progress.tell(observation.pods)
        pods = [describe_pod(pod) for pod in fleet.pods()]
        if pods != self._written:
            self._written = pods
            self._state.write(self._state.pods_file, pods)
        if status != self._status:
            self._announce(service, status)
            self._status = status
            self._state.write(
                self._state.status_file, status.model_dump(mode="json", by_alias=True)
            )

    def _announce(self, service: InferenceService, status: Status) -> None:
        """Tell when the service becomes ready, with a request to try, and when it ceases to be."""
        for condition in transitions(self._status, status):
            if condition.type != "Ready" or self._ending.is_set():
                continue
            if condition.status == "True":
                example = example_request(
                    status.url, service.spec.model.served_name, api_key_file(self._state, service)
                )
                self._terminal.say(f"ready at {status.url}; ask with `penstock chat`, or with")
                self._terminal.show(f"\n{example}\n")
            elif self._status is not None:
                self._terminal.say(f"not ready any more: {condition.message}")

    # --- surroundings -------------------------------------------------------------------------

    def _surroundings(self, service: InferenceService, listener: socket.socket) -> Surroundings:
        prefill = service.spec.prefill
        stages = prefill.wanted * prefill.pipeline_parallel if prefill else 0
        workers = stages + service.spec.decode.wanted
        return Surroundings(
            api=listener.fileno(),
            hosts_file=self._state.hosts_file,
            endpoints_file=self._state.endpoints_file,
            secrets=self._secrets,
            programs=self._settings.programs,
            threads=threads_for_workers(len(os.sched_getaffinity(0)), workers),
        )

    def _local_secrets(self, service: InferenceService) -> dict[str, Path]:
        """Return a directory for each Secret; an API key that nobody gave is made up.

        Raises StateError for a token that nobody gave.
        """
        found = {podspec.key_secret(service): self._state.keys}
        wanted = {
            service.spec.router.api_key_secret: labels.API_KEY_ENTRY,
            service.spec.model.token_secret: labels.TOKEN_ENTRY,
        }
        for name, entry in wanted.items():
            if name is None:
                continue
            directory = self._state.secrets / name
            directory.mkdir(mode=0o700, exist_ok=True)
            given = self._settings.secrets.get(name)
            if given is not None:
                for file, text in _read_secret(name, given, entry).items():
                    write_private(directory / file, text)
            elif entry == labels.API_KEY_ENTRY:
                if not (directory / entry).exists():
                    write_private(directory / entry, secrets.token_urlsafe(24) + "\n")
                self._terminal.say(f"the API asks for the bearer key in {directory / entry}")
            else:
                raise StateError(
                    f"there is no secret {name} (spec.model.tokenSecret) on this machine",
                    remedy=f"give a file with the token, or a directory of all entries: "
                    f"--secret {name}=PATH",
                )
            found[name] = directory
        return found

    def _clean_up_after_crash(self) -> None:
        """End what a killed supervisor may have left, and forget what the last one wrote."""
        for pod in self._state.read(self._state.pods_file) or []:
            pid, started = pod.get("pid"), pod.get("started")
            if isinstance(pid, int) and isinstance(started, int) and kill_leftover(pid, started):
                self._terminal.say(f"ended {pod.get('name')} (pid {pid}), left by a crash")
        self._forget()
        for log in self._state.logs.glob("*.log*"):
            if log != self._state.log_file("supervisor"):
                log.unlink()

    def _forget(self) -> None:
        state = self._state
        for file in (state.status_file, state.pods_file, state.endpoints_file, state.hosts_file):
            file.unlink(missing_ok=True)

    # --- the end ------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._killing = self._ending.is_set()
        self._ending.set()
        self._wake.set()

    async def _end(self, fleet: Fleet) -> None:
        """Drain everything, then kill what is left; a second signal kills at once."""
        pods = fleet.pods()
        if pods:
            self._terminal.say("stopping; once more Ctrl-C ends at once")
        for pod in pods:
            pod.stop(self._settings.shutdown_grace)
        loop = asyncio.get_running_loop()
        limit = self._settings.shutdown_grace + self._settings.kill_seconds
        deadline = loop.time() + limit
        while not all(pod.stopped for pod in pods) and loop.time() < deadline:
            if self._killing:
                for pod in pods:
                    pod.kill()
            self._wake.clear()
            with contextlib.suppress(StateError):  # nobody reads it much longer
                self._report(fleet, self._service)
            await self._pause()
        for pod in pods:
            pod.check()
        left = [pod.launch.identity.short for pod in pods if pod.pid is not None]
        if left:
            raise ServiceFailed(
                f"could not end {', '.join(left)} within {limit:.0f} s",
                remedy="the kernel does not let them go; look at `ps -o pid,stat,wchan`",
            )


def describe_pod(pod: LocalPod) -> dict[str, object]:
    """Return a pod as `penstock ps` shows it."""
    seen, identity = pod.observe(), pod.launch.identity
    return {
        "name": identity.short,
        "pod": identity.name,
        "role": identity.role,
        "group": seen.group,
        "stage": seen.stage if identity.role == "prefill" else None,
        "pid": pod.pid,
        "started": pod.started,
        "address": pod.launch.control or pod.launch.http,
        "http": pod.launch.http,
        "state": seen.state,
        "progress": seen.progress,
        "message": seen.message,
        "restarts": seen.restarts,
        "revision": seen.revision,
    }


def local_url(host: str, port: int) -> str:
    """Return where a person on this machine reaches the API."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - only shown
    return (
        f"http://[{shown}]:{port}" if ":" in shown and shown[0] != "[" else f"http://{shown}:{port}"
    )


def _read_secret(name: str, path: Path, entry: str) -> dict[str, str]:
    """Return a secret's entries: the files of a directory, or one file as `entry`."""
    try:
        files = (
            {file.name: file for file in path.iterdir() if file.is_file()}
            if path.is_dir()
            else {entry: path}
        )
        return {key: file.read_text(encoding="utf-8") for key, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"{path} for the secret {name} cannot be read: {error}",
            remedy=f"give a readable text file, or a directory of them: --secret {name}=PATH",
        ) from error
