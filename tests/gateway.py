"""A server in front of another one that answers 503 when a test wants it, for S3 stores and MLflow."""

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from tests.waiting import PATIENCE_S


@dataclass
class Outage:
    """Begins with the first request for which `begins(method, path)` is true, and lasts `seconds`."""

    name: str
    begins: Callable[[str, str], bool]
    seconds: float
    loses_answer: bool = False
    """The first request still reaches the server; only what that answers is lost."""
    refused: int = 0
    """Requests so far that got no answer from the server."""
    until: float = 0.0
    """Of the monotonic clock."""
    over: threading.Event = field(default_factory=threading.Event)

    def fate(self, method: str, path: str) -> Literal["answered", "refused", "lost"]:
        """What becomes of a request that comes now."""
        now = time.monotonic()
        if not self.until and self.begins(method, path):
            self.until = now + self.seconds
        if now >= self.until:
            if self.until:
                self.over.set()
            return "answered"
        self.refused += 1
        return "lost" if self.loses_answer and self.refused == 1 else "refused"


class Gateway(ThreadingHTTPServer):
    """Passes requests on. While `closed`, or in an outage, it answers 503 and counts these answers."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server.removeprefix("http://")
        self.closed = threading.Event()
        self.refused = 0
        self._outages: list[Outage] = []
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def plan(self, outage: Outage) -> Outage:
        """It begins when those that were planned before are over. At least one request is refused."""
        with self._lock:
            self._outages.append(outage)
        return outage

    def fate(self, method: str, path: str) -> Literal["answered", "refused", "lost"]:
        """What becomes of a request."""
        with self._lock:
            outage = next((outage for outage in self._outages if not outage.over.is_set()), None)
            fate = "refused" if self.closed.is_set() else "answered" if outage is None else outage.fate(method, path)
            self.refused += fate != "answered"
        return fate

    def handle_error(self, request, client_address):
        """Clients that hang up are no defect."""


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate(self.command, self.path)
        if fate == "refused":
            self.answer(503, {}, b"")
            return
        server = http.client.HTTPConnection(self.server.server, timeout=PATIENCE_S)
        server.request(self.command, self.path, body, dict(self.headers))
        found = server.getresponse()
        content = found.read()
        server.close()
        if fate == "lost":
            self.answer(503, {}, b"")
        else:
            self.answer(found.status, dict(found.getheaders()), content)

    def answer(self, status, headers, body):
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = pass_on
