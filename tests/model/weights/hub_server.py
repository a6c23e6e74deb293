"""Fake Hugging Face hub on loopback that serves one model. Not a test module."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/some-model"
REVISIONS = (["main"], ["v1"], [COMMIT])


@dataclass
class Hub:
    url: str
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    failure: int | None = None
    """Status of all answers, which are then pages for people. None answers as the hub does."""

    @property
    def fetched(self) -> list[str]:
        """Names of the files that were requested with GET."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """Serve a hub with one model: the files of `folder`, at one commit, which `main` and `v1` refer to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if hub.failure is not None:
                self._send(b"<html>Please log in</html>", "text/html", hub.failure)
                return
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == REPO and parts[5:] in REVISIONS:
                files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": files}).encode(), "application/json")
            elif parts[2:3] == ["resolve"] and parts[3:4] in REVISIONS and (folder / parts[-1]).is_file():
                self._send((folder / parts[-1]).read_bytes(), "application/octet-stream")
            else:
                self.send_response(404)
                code = "RevisionNotFound" if "/".join(parts[2:4]) == REPO else "RepoNotFound"
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def _send(self, content: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
