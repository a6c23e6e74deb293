"""Start an MLflow server in a separate process."""

import contextlib
import http.client
import socket
import subprocess
import sys

from tests.waiting import wait_until


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(folder, port):
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/server"]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)

    def is_up():
        assert process.poll() is None, (folder / "server.log").read_text()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200

    wait_until(is_up, "the MLflow server", pause_s=0.2)
    return process
