from __future__ import annotations

import itertools
import pickle
import socket
import socketserver
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest
from botocore.exceptions import NoCredentialsError

from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import (
    AccessDeniedError,
    ObjectExistsError,
    OutageError,
    StorageError,
)
from m2f.data_pipeline.storage import s3 as s3_store
from m2f.data_pipeline.storage.storage import Storage
from tests.waiting import PATIENCE_S, wait_until

BODY = bytes(range(256)) * 4
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


class _FaultyServer(socketserver.ThreadingTCPServer):
    """Server that returns BODY for every URL. Each request takes the next fault from `faults`, if any is left."""

    allow_reuse_address = True
    daemon_threads = True
    faults: list[str]
    requests: int
    access_key: str = "test"


class _FaultyHandler(BaseHTTPRequestHandler):
    server: _FaultyServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        if (fault := self._next_fault()).isdigit():
            self._send_status(fault)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_DELETE(self):
        fault = self._next_fault()
        self._send_status(fault if fault.isdigit() else "204")

    def _next_fault(self):
        self.server.requests += 1
        fault = self.server.faults.pop(0) if self.server.faults else "none"
        return fault if f"Credential={self.server.access_key}/" in self.headers["Authorization"] else "403"

    def _send_status(self, status):
        self.send_response(int(status))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        if (fault := self._next_fault()).isdigit():
            self._send_status(fault)
            return
        if fault == "expired":
            self.send_response(400)
            self.send_header("Content-Length", str(len(EXPIRED)))
            self.end_headers()
            self.wfile.write(EXPIRED)
            return
        first, last = (int(v) for v in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = BODY[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(BODY)}")
        if fault == "flipped":  # the checksum does not match the bytes
            self.send_header("x-amz-checksum-crc32", "AAAAAA==")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(body[:1])
            self.wfile.flush()
            self.connection.recv(1)  # returns when the client disconnects
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def faulty_server():
    with _FaultyServer(("127.0.0.1", 0), _FaultyHandler) as server:
        server.faults, server.requests = [], 0
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def _config_of(server, **settings):
    return StorageConfig(endpoint_url=f"http://127.0.0.1:{server.server_address[1]}", **settings)


def _storage_at(server, **settings):
    return Storage(_config_of(server, **settings))


def test_transient_faults_are_retried(faulty_server):
    faulty_server.faults = ["503", "500", "cut", "429", "stall", "cut"]
    storage = _storage_at(faulty_server, read_timeout_s=3.0)
    assert storage.get_range("s3://bucket/key", 100, 700) == BODY[100:800]
    assert storage.counters.retries >= 6  # on a busy machine, further requests may run into the read timeout
    assert storage.counters.requests == storage.counters.retries + 1


def test_bytes_with_a_wrong_checksum_are_read_again(faulty_server):
    faulty_server.faults = ["flipped", "flipped"]
    storage = _storage_at(faulty_server)
    assert storage.get_range("s3://bucket/key", 100, 700) == BODY[100:800]
    assert storage.counters.retries == 2


def test_permanent_faults_are_not_retried(faulty_server):
    for status, message in (("404", "does not exist"), ("400", "400")):
        faulty_server.faults, faulty_server.requests = [status], 0
        with pytest.raises(StorageError, match=f"s3://bucket/key.*{message}"):
            _storage_at(faulty_server).get_range("s3://bucket/key", 0, 10)
        assert faulty_server.requests == 1


def test_expired_credentials_are_looked_up_again_once(faulty_server, monkeypatch):
    storage = _storage_at(faulty_server, patience_s=0.5)
    for _ in range(2):  # the first answer replaces the client
        assert storage.get_range("s3://bucket/key", 0, 10) == BODY[:10]
    faulty_server.access_key = "newer"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "newer")
    assert storage.get_range("s3://bucket/key", 0, 10) == BODY[:10]
    assert (storage.counters.retries, faulty_server.requests) == (1, 4)
    faulty_server.access_key = "newest"
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/key.*access is denied \(403.*credentials"):
        storage.get_range("s3://bucket/key", 0, 10)
    assert faulty_server.requests == 6


@pytest.mark.parametrize("reached", [True, False])
def test_missing_credentials_are_looked_up_again_if_the_store_answered_before(faulty_server, monkeypatch, reached):
    storage = _storage_at(faulty_server, patience_s=60.0)
    if reached:
        storage.get_range("s3://bucket/key", 0, 10)
    find, lookups = s3_store._make_client, []

    def lookup(*args):
        lookups.append(args)
        client = find(*args)
        if len(lookups) < 3:  # as if the metadata service had not answered
            monkeypatch.setattr(client, "get_object", fail)
        return client

    def fail(**_):
        raise NoCredentialsError

    monkeypatch.setattr(s3_store, "_make_client", lookup)
    if reached:
        assert storage.get_range("s3://bucket/key", 0, 10) == BODY[:10]
    else:
        with pytest.raises(StorageError, match="no complete AWS credentials"):
            storage.get_range("s3://bucket/key", 0, 10)
        assert len(lookups) == 1


def test_head_status_400_looks_up_credentials_again(faulty_server):
    storage = _storage_at(faulty_server, patience_s=0.5)
    storage.get_range("s3://bucket/key", 0, 10)
    faulty_server.faults = ["400"]
    assert storage.stat("s3://bucket/key").size == len(BODY)
    assert storage.counters.retries == 1


def test_request_waits_for_credentials_that_are_renewed_late(faulty_server):
    storage = _storage_at(faulty_server, patience_s=60.0)
    storage.get_range("s3://bucket/key", 0, 10)
    faulty_server.faults = ["expired"] * 4
    assert storage.get_range("s3://bucket/key", 0, 10) == BODY[:10]
    assert storage.counters.retries == 4
    faulty_server.faults = ["400"] * 8  # botocore sends a second request, because the region may be wrong
    assert storage.stat("s3://bucket/key").size == len(BODY)
    assert storage.counters.retries == 8


def test_credentials_that_stay_expired_raise_an_error_with_the_remedy(faulty_server):
    faulty_server.faults = ["expired"] * 1000
    with pytest.raises(AccessDeniedError, match="400 ExpiredToken"):  # the first answer of the store
        _storage_at(faulty_server).get_range("s3://bucket/key", 0, 10)
    with pytest.raises(OutageError, match=r"valid AWS credentials have been missing .* Renew the credentials"):
        _storage_at(faulty_server, patience_s=0.5).get_range("s3://bucket/key", 0, 10)


def test_outage_is_retried_and_reported_once_a_minute(faulty_server, monkeypatch):
    lines, now = [], itertools.count(step=10)
    storage = Storage(_config_of(faulty_server), known_reachable=True, on_wait=lines.append)
    monkeypatch.setattr("m2f.data_pipeline.storage.s3.time", SimpleNamespace(monotonic=now.__next__, sleep=id))
    faulty_server.faults = ["503"] * 10
    assert storage.get_range("s3://bucket/key", 0, 10) == BODY[:10]
    assert storage.counters.retries == 10
    assert 2 <= len(lines) <= 5
    assert lines[0].startswith("waiting for the storage: s3://bucket/key has failed for ")
    assert "(503 503); storage.patience_s is 600 s" in lines[0]


def test_outage_longer_than_patience_raises_error(faulty_server):
    faulty_server.faults = ["503"] * 1000
    with pytest.raises(OutageError, match=r"longer than storage\.patience_s \(0\.5 s; \d+ attempts .*503"):
        Storage(_config_of(faulty_server, patience_s=0.5), known_reachable=True).get_range("s3://bucket/key", 0, 10)
    assert faulty_server.requests >= 2


def test_requests_wait_until_a_stopped_server_returns():
    """The server is started only after two failed requests."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = reserved.getsockname()
    storage = Storage(StorageConfig(endpoint_url=f"http://127.0.0.1:{address[1]}"), known_reachable=True)
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(storage.get_range("s3://bucket/key", 100, 700)))
    reader.start()
    wait_until(lambda: storage.counters.retries >= 2)
    with _FaultyServer(address, _FaultyHandler) as server:
        server.faults, server.requests = [], 0
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        reader.join(PATIENCE_S)
        server.shutdown()
    assert results == [BODY[100:800]]


@pytest.mark.parametrize("endpoint_url", ["http://127.0.0.1:9", "http://nobody.invalid"])
def test_unreachable_store_that_answered_before_is_an_outage(endpoint_url):
    with pytest.raises(OutageError, match=r"longer than storage\.patience_s \(0\.5 s; \d+ attempts"):
        Storage(StorageConfig(endpoint_url=endpoint_url, patience_s=0.5), known_reachable=True).get("s3://bucket/key")


def test_store_that_never_answered_raises_storage_error_and_no_outage(faulty_server, monkeypatch):
    monkeypatch.setattr("m2f.data_pipeline.storage.s3.FIRST_CONTACT_S", 3.0)
    faulty_server.faults = ["503"] * 1000
    with pytest.raises(StorageError, match=r"the store does not answer .*503.*check storage\.endpoint_url") as caught:
        _storage_at(faulty_server, read_timeout_s=2.5).get_range("s3://bucket/key", 0, 10)
    assert not isinstance(caught.value, OutageError)


@pytest.mark.parametrize("fault", ["404", "none"])
def test_patience_applies_after_any_answer_of_the_store(faulty_server, fault):
    faulty_server.faults = [fault]
    with suppress(StorageError):
        _storage_at(faulty_server).get_range("s3://bucket/key", 0, 10)
    faulty_server.faults = ["503"] * 1000
    with pytest.raises(OutageError):
        _storage_at(faulty_server, patience_s=0.2).get_range("s3://bucket/other", 0, 10)


def test_pickled_storage_keeps_that_the_store_has_answered(faulty_server, monkeypatch):
    storage = _storage_at(faulty_server, patience_s=0.2)
    storage.get_range("s3://bucket/key", 0, 10)
    data = pickle.dumps(storage)
    monkeypatch.setattr("m2f.data_pipeline.storage.s3._REACHED_ENDPOINTS", set())  # as in a new process
    faulty_server.faults = ["503"] * 1000
    with pytest.raises(OutageError):
        pickle.loads(data).get_range("s3://bucket/key", 0, 10)


def test_unreachable_endpoint_raises_error_with_its_address(monkeypatch):
    monkeypatch.setattr("m2f.data_pipeline.storage.s3.FIRST_CONTACT_S", 1.0)
    storage = Storage(StorageConfig(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        storage.get("s3://bucket/key")


def test_denied_deletion_keeps_the_object_with_a_warning(faulty_server, caplog):
    faulty_server.faults = ["403", "403"]
    _storage_at(faulty_server).delete("s3://bucket/key")
    assert "not deleted: s3://bucket/key: access is denied (403" in caplog.text


class _LosesFirstResponse:
    """Client that loses the response of its first successful put_object."""

    def __init__(self, client):
        self.client, self.has_failed = client, False

    def __getattr__(self, name):
        return getattr(self.client, name)

    def put_object(self, **arguments):
        self.client.put_object(**arguments)
        if not self.has_failed:
            self.has_failed = True
            raise ConnectionResetError("peer went away")


def test_a_repeated_conditional_write_recognises_its_own_bytes(s3_endpoint, tmp_path):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint))
    url = f"s3://box/{tmp_path.name}/lost-answer"
    storage.exists(url)  # the first answer replaces the client
    storage._s3._client = _LosesFirstResponse(storage._s3._get_client())
    storage.put(url, b"same", if_absent=True)
    assert storage.counters.retries == 1
    with pytest.raises(ObjectExistsError):
        storage.put(url, b"same", if_absent=True)
