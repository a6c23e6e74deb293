"""Proxy for S3 stores and MLflow servers that responds with 503 during planned outages."""

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
    """An outage that begins with the first request for which `begins(method, path)` is true, and lasts `seconds`."""

    name: str
    begins: Callable[[str, str], bool]
    seconds: float
    loses_response: bool = False
    """Whether the first request still reaches the server, and only its response is lost."""
    refused: int = 0
    """Number of requests so far that got no response from the server."""
    ends_at: float = 0.0
    """End of the outage on the monotonic clock; 0 before it begins."""
    has_ended: threading.Event = field(default_factory=threading.Event)

    def decide_outcome(self, method: str, path: str) -> Literal["answered", "refused", "lost"]:
        """Return what happens to a request that arrives now."""
        now = time.monotonic()
        if not self.ends_at and self.begins(method, path):
            self.ends_at = now + self.seconds
        if now >= self.ends_at:
            if self.ends_at:
                self.has_ended.set()
            return "answered"
        self.refused += 1
        return "lost" if self.loses_response and self.refused == 1 else "refused"


class Gateway(ThreadingHTTPServer):
    """Forwards requests. While `closed` is set, or during an outage, it counts requests and responds with 503."""

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
        """Add an outage, which can begin when all earlier ones have ended. At least one request is refused."""
        with self._lock:
            self._outages.append(outage)
        return outage

    def decide_outcome(self, method: str, path: str) -> Literal["answered", "refused", "lost"]:
        """Return what happens to a request."""
        with self._lock:
            outage = next((outage for outage in self._outages if not outage.has_ended.is_set()), None)
            if self.closed.is_set():
                outcome = "refused"
            else:
                outcome = "answered" if outage is None else outage.decide_outcome(method, path)
            self.refused += outcome != "answered"
        return outcome

    def handle_error(self, request, client_address):
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        outcome = self.server.decide_outcome(self.command, self.path)
        if outcome == "refused":
            self.respond(503, {}, b"")
            return
        server = http.client.HTTPConnection(self.server.server, timeout=PATIENCE_S)
        server.request(self.command, self.path, body, dict(self.headers))
        response = server.getresponse()
        content = response.read()
        server.close()
        if outcome == "lost":
            self.respond(503, {}, b"")
        else:
            self.respond(response.status, dict(response.getheaders()), content)

    def respond(self, status, headers, body):
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = forward
