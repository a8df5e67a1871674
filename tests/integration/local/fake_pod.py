"""Stands for a worker or a router: serves the probes, and misbehaves when told to.

fake_pod.py worker|router [the real program's arguments] [--fake-… as below]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    kind = sys.argv[1]
    args = _parse(sys.argv[2:])
    if args.fake_crash_until and not Path(args.fake_crash_until).exists():
        print("loading", flush=True)
        print("RuntimeError: out of pages", file=sys.stderr, flush=True)
        sys.exit(3)
    if args.fake_child:
        child = subprocess.Popen(["/bin/sleep", "300"])
        print(f"child {child.pid}", flush=True)
    host, port = (args.host, str(args.port)) if kind == "router" else args.http.split(":")
    server = _Server((host, int(port)), args, kind)
    shared = server.sharing(args.fd) if args.fd is not None else None
    stop = threading.Event()

    def on_term(*_: object) -> None:
        server.draining = True
        if shared is not None:
            shared.socket.close()  # the next router accepts from now on
        if not args.fake_stubborn:
            stop.set()

    signal.signal(signal.SIGTERM, on_term)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{args.name} serves, revision {args.revision}", flush=True)
    while not stop.wait(0.2):
        pass
    time.sleep(args.fake_drain)
    if shared is not None:
        shared.shutdown()
        shared.server_close()  # waits for the answers that are under way
    print("drained", flush=True)
    os._exit(0)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("name", "http", "bind", "host", "revision", "discovery", "keys", "hosts-file"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--require-prefill", action=argparse.BooleanOptionalAction)
    parser.add_argument("--fake-load", type=float, default=0.0)
    parser.add_argument("--fake-drain", type=float, default=0.0)
    parser.add_argument("--fake-crash-until")
    parser.add_argument("--fake-child", action="store_true")
    parser.add_argument("--fake-stubborn", action="store_true")
    return parser.parse_known_args(words)[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        args: argparse.Namespace,
        kind: str,
        inherited: socket.socket | None = None,
    ) -> None:
        super().__init__(address, _Handler, bind_and_activate=inherited is None)
        if inherited is not None:
            self.socket.close()
            self.socket = inherited
        self.args = args
        self.kind = kind
        self.draining = False
        self.was_ready = False
        self.began = time.monotonic()

    def sharing(self, descriptor: int) -> _Server:
        """Serve an inherited listening socket too."""
        inherited = socket.socket(fileno=descriptor)
        inherited.setblocking(False)  # whoever shares it may be faster to accept
        server = _Server(("", 0), self.args, self.kind, inherited)
        server.daemon_threads = False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def worker_ready(self) -> tuple[bool, dict[str, object]]:
        load = self.args.fake_load
        progress = min(1.0, (time.monotonic() - self.began) / load) if load else 1.0
        ready = progress == 1.0 and not self.draining
        state = "draining" if self.draining else "ready" if ready else "starting"
        return ready, {
            "ready": ready,
            "state": state,
            "progress": progress,
            "message": "loading weights",
        }

    def router_ready(self) -> tuple[bool, dict[str, object]]:
        path = Path(self.args.discovery.removeprefix("file:"))
        workers = json.loads(path.read_text())["endpoints"]
        needed = ["decode", *(["prefill"] if self.args.require_prefill else [])]
        missing = [
            role
            for role in needed
            if not any(_is_ready(w["http"]) for w in workers if w["role"] == role)
        ]
        reasons = [f"no {role} worker is ready" for role in missing]
        self.was_ready = self.was_ready or not missing
        return not missing, {"ready": not missing, "reasons": reasons}


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        ok, body = True, {"revision": self.server.args.revision, "pid": os.getpid()}
        if self.path == "/readyz":
            ok, body = self.server.worker_ready()
        elif self.path == "/ready":
            ok, body = self.server.router_ready()
        elif self.path == "/accepting":
            self.server.router_ready()
            ok = self.server.was_ready and not self.server.draining
            body = {"accepting": ok}
        elif self.path == "/argv":
            body = {"argv": sys.argv[1:]}
        data = json.dumps(body).encode()
        self.send_response(200 if ok else 503)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _is_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
