"""Objects in S3 and S3-compatible stores, over boto3.

botocore's own retries are off: they do not cover a body that breaks midway. One loop here covers request and body.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import (
    AccessDeniedError,
    MissingObjectError,
    ObjectExistsError,
    OutageError,
    StorageError,
)
from m2f.data_pipeline.storage.local import replacing
from m2f.data_pipeline.storage.object_info import ObjectInfo, UnfinishedWrite
from m2f.data_pipeline.urls import REMEDY, url_problem
from m2f.model.extras import missing_extra

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_CONTACT_S = 20.0
"""How long a store that has not answered yet is asked: a wrong endpoint is a mistake, no outage."""
_CONNECT_TIMEOUT_S = 10.0
"""A host that accepts no connection for so long is taken for unreachable; a shorter read timeout counts for both. The
first answer may take no longer either."""
_SAY_S = 60.0
"""Seconds between two lines about requests that wait."""
_ANSWERED: set[str | None] = set()
"""Endpoints that have answered this process: from then on their silence is an outage."""
_POOL_CONNECTIONS = 64
"""Connections that are kept open: above the sum of all thread pools of a process that read or write."""
_BACKOFF_BASE_S = 0.1
_BACKOFF_CAP_S = 20.0
"""Attempt n waits a random time of at most base x 2^n and the cap."""
_FILE_PART_BYTES = 32 * 1024 * 1024
"""Files are read in ranges of this size, so that a broken body costs no more."""
_TRANSIENT_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
"""HTTP statuses, and below error codes of S3, after which the same request may succeed."""
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError", "ThrottlingException"}
)
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
"""Error codes after which the request is repeated with new credentials."""


class _BrokenBodyError(Exception):
    """A body that ended early."""


class S3Store:
    """One S3 endpoint. Clients are made on first use, one per process, and shared by its threads."""

    def __init__(
        self,
        config: StorageConfig,
        answered: bool,
        on_retry: Callable[[], None],
        on_wait: Callable[[str], None],
    ) -> None:
        """`on_retry` is called for every repeated request, `on_wait` once a minute with a line while requests wait."""
        self._config = config
        if answered:
            _ANSWERED.add(config.endpoint_url)
        self._on_retry, self._on_wait = on_retry, on_wait
        self._said = 0.0
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._client: Any = None
        self._client_key: tuple[int, bool] = (-1, False)

    @contextmanager
    def until(self, stopped: threading.Event) -> Iterator[None]:
        """Within it, this thread's failed requests are not repeated once `stopped` is set."""
        self._thread.stopped = stopped
        try:
            yield
        finally:
            del self._thread.stopped

    def get(self, url: str) -> bytes:
        """The whole object."""
        return self._retrying(url, lambda client: _read_body(client.get_object(**_address(url))))

    def get_range(self, url: str, offset: int, length: int, etag: str | None) -> bytes:
        """Exactly `length` bytes from `offset` of the object that has this `etag`."""
        if length == 0:
            return b""
        condition = {} if etag is None else {"IfMatch": etag}

        def request(client: Any) -> bytes:
            response = client.get_object(**_address(url), Range=f"bytes={offset}-{offset + length - 1}", **condition)
            if etag is not None and response.get("ETag", etag) != etag:  # a store that ignores the condition
                _fail_replaced(url)
            _check_range(url, response, offset, length)
            return _read_body(response)

        return self._retrying(url, request)

    def get_file(self, url: str, path: Path) -> int:
        """Copy the object to `path` in ranges, so that a broken connection costs one range; returns its size."""
        info = self.stat(url)
        with replacing(path) as file:
            for offset in range(0, info.size, _FILE_PART_BYTES):
                file.write(self.get_range(url, offset, min(_FILE_PART_BYTES, info.size - offset), info.etag))
        return info.size

    def stat(self, url: str) -> ObjectInfo:
        """Size and ETag."""
        response = self._retrying(url, lambda client: client.head_object(**_address(url)))
        return ObjectInfo(int(response["ContentLength"]), response.get("ETag"))

    def exists(self, url: str) -> bool:
        """Whether the object exists."""
        try:
            self.stat(url)
        except MissingObjectError:
            return False
        return True

    def put(self, url: str, data: bytes, if_absent: bool) -> None:
        """Write an object; with `if_absent` never replace one."""
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        attempts = 0

        def request(client: Any) -> None:
            nonlocal attempts
            attempts += 1
            client.put_object(**_address(url), Body=data, **condition)

        try:
            self._retrying(url, request)
        except ObjectExistsError:
            # A repeated write may meet the object that its own first attempt left when only the answer was lost.
            if attempts == 1 or self.stat(url).size != len(data) or self.get(url) != data:
                raise

    def put_file(self, url: str, path: Path) -> None:
        """Upload a file of any size (in parts when it is large)."""
        address = _address(url)
        self._retrying(url, lambda client: client.upload_file(str(path), address["Bucket"], address["Key"]))

    def list(self, prefix: str) -> tuple[str, ...]:
        """All objects below a folder."""
        bucket, folder = _split_folder(prefix)

        def request(client: Any) -> tuple[str, ...]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
            return tuple(sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())))

        return self._retrying(prefix, request)

    def delete(self, url: str) -> None:
        """Delete an object where it exists. A store that allows no deletion keeps it, which is said."""
        try:
            self._retrying(url, lambda client: client.delete_object(**_address(url)))
        except AccessDeniedError as error:
            log.warning("not deleted: %s", error)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder where it exists."""
        if not _split_folder(prefix)[1]:
            raise StorageError(f"{prefix}: refusing to delete a whole bucket; name a folder in it")
        for url in self.list(prefix):
            self.delete(url)

    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Multipart uploads below a folder that nobody completed. They cost money and no listing shows them."""
        bucket, folder = _split_folder(prefix)

        def request(client: Any) -> tuple[UnfinishedWrite, ...]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=folder)
            found = [upload for page in pages for upload in page.get("Uploads", ())]
            return tuple(UnfinishedWrite(f"s3://{bucket}/{upload['Key']}", upload["UploadId"]) for upload in found)

        return self._retrying(prefix, request)

    def delete_unfinished(self, write: UnfinishedWrite) -> None:
        """Abort a multipart upload; nothing happens where it has ended."""
        address = _address(write.url)
        try:
            self._retrying(write.url, lambda client: client.abort_multipart_upload(**address, UploadId=write.upload))
        except MissingObjectError:
            return

    def _retrying(self, url: str, request: Callable[[Any], T]) -> T:
        """Run a request until it succeeds, cannot succeed, or patience ends. Raises OutageError for the last."""
        began, renewed = time.monotonic(), False
        for attempt in itertools.count():
            try:
                client = self._connect()
                if attempt == 0:  # making a client takes a second, for which the store is not to blame
                    began = time.monotonic()
                result = request(client)
                _ANSWERED.add(self._config.endpoint_url)
                return result
            except StorageError:
                raise
            except Exception as raised:
                error = _root(raised)
                if _is_denied(error) and not renewed:
                    self._forget_credentials()
                    renewed = True
                    self._on_retry()
                    continue  # at once: a refusal is no outage
                if not _is_passing(error):
                    if _response_error(error)[0]:
                        _ANSWERED.add(self._config.endpoint_url)
                    _fail(url, error)
            pause = random.uniform(0, min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2 ** min(attempt, 10)))
            longest = 0.0 if self.answered else self._connect_timeout_s  # of one more attempt
            if time.monotonic() + pause + longest > began + self._patience_s:
                self._give_up(url, error, attempt + 1, time.monotonic() - began)
            self._say_wait(url, error, time.monotonic() - began)
            self._on_retry()
            if self._pause(pause):
                raise StorageError(f"{url}: reading was stopped while the store did not answer") from error
        raise AssertionError("unreachable: the loop has no end")

    @property
    def answered(self) -> bool:
        """Whether the store has answered this process, or answered the one that started it."""
        return self._config.endpoint_url in _ANSWERED

    @property
    def _patience_s(self) -> float:
        return self._config.patience_s if self.answered else min(FIRST_CONTACT_S, self._config.patience_s)

    @property
    def _connect_timeout_s(self) -> float:
        return min(_CONNECT_TIMEOUT_S, self._config.read_timeout_s)

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt. Returns True, early, if what this thread reads is wanted no longer."""
        stopped: threading.Event = getattr(self._thread, "stopped", None) or threading.Event()
        return stopped.wait(seconds)

    def _give_up(self, url: str, error: Exception, attempts: int, seconds: float) -> NoReturn:
        tries = f"{attempts} attempts in {seconds:.0f} s, the last one failed with {_describe(error)}"
        if not self.answered:
            raise StorageError(
                f"{url}: the store does not answer ({tries}); check storage.endpoint_url and the network"
            ) from error
        raise OutageError(
            f"{url}: the store has not answered for longer than storage.patience_s ({self._config.patience_s:g} s; "
            f"{tries}). Start the run again when the store is back"
        ) from error

    def _say_wait(self, url: str, error: Exception, seconds: float) -> None:
        """One line a minute, whichever thread waits."""
        now = time.monotonic()
        if seconds >= _SAY_S and now - self._said >= _SAY_S:
            self._said = now
            self._on_wait(
                f"waiting for the storage: {url} has failed for {seconds:.0f} s ({_describe(error)}); "
                f"storage.patience_s is {self._config.patience_s:g} s"
            )

    def _connect(self) -> Any:
        """This process's client; one that came through a fork is not used."""
        key = (os.getpid(), self.answered)
        with self._lock:
            if self._client is None or self._client_key != key:
                read_timeout_s = self._config.read_timeout_s if self.answered else self._connect_timeout_s
                self._client = _make_client(self._config, self._connect_timeout_s, read_timeout_s)
                self._client_key = key
            return self._client

    def _forget_credentials(self) -> None:
        """Look for credentials anew: temporary ones may have expired, and newer ones be there."""
        with self._lock:
            self._client = None


def _make_client(config: StorageConfig, connect_timeout_s: float, read_timeout_s: float) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise StorageError(str(missing_extra("a store at s3://", error) or error)) from error
    if (problem := url_problem(_endpoint(config) or "")) is not None:
        raise StorageError(f"the endpoint of S3 in AWS_ENDPOINT_URL {problem}, and would be printed. {REMEDY}")
    options = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=_POOL_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={"addressing_style": "path" if _endpoint(config) else "auto"},
    )
    # A session of our own: boto3's default session is not safe to create from several threads.
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=config.endpoint_url, region_name=config.region, config=options)


def _endpoint(config: StorageConfig) -> str | None:
    return config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{url}: no bucket; write s3://bucket/key")
    return bucket, key


def _split_folder(url: str) -> tuple[str, str]:
    bucket, key = _split(url)
    return bucket, f"{key.strip('/')}/" if key.strip("/") else ""


def _address(url: str) -> dict[str, str]:
    bucket, key = _split(url)
    if not key:
        raise StorageError(f"{url}: no object key; write s3://bucket/key")
    return {"Bucket": bucket, "Key": key}


def _read_body(response: Any) -> bytes:
    data = response["Body"].read()
    if len(data) != response["ContentLength"]:
        raise _BrokenBodyError(f"{len(data)} of {response['ContentLength']} bytes arrived")
    return data


def _check_range(url: str, response: Any, offset: int, length: int) -> None:
    """An object that is too short fails at once: asking again cannot make it longer."""
    total = re.search(r"/(\d+)$", response.get("ContentRange", ""))
    if total and offset + length > int(total[1]):
        raise StorageError(
            f"{url}: {length} bytes at offset {offset} were asked for, but the object has {total[1]} bytes; "
            "it was cut off or replaced"
        )
    if response["ContentLength"] != length:
        raise _BrokenBodyError(f"the store announced {response['ContentLength']} bytes instead of {length}")


def _response_error(error: BaseException) -> tuple[int, str]:
    """HTTP status and S3 error code; (0, "") for errors without an answer."""
    response = getattr(error, "response", None) or {}  # None on botocore's streaming errors
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _root(error: Exception) -> Exception:
    """What lies behind boto3's wrapper around failed uploads."""
    from boto3.exceptions import S3UploadFailedError

    wrapped = error.__context__ if isinstance(error, S3UploadFailedError) else None
    return wrapped if isinstance(wrapped, Exception) else error


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    from botocore.exceptions import (
        ClientError,
        FlexibleChecksumError,
        HTTPClientError,
        ResponseStreamingError,
        SSLError,
    )
    from botocore.exceptions import ConnectionError as NoConnectionError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        status, code = _response_error(error)
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    if isinstance(error, SSLError):  # a wrong certificate stays wrong
        return False
    passing = (
        FlexibleChecksumError,
        HTTPClientError,
        ResponseStreamingError,
        HTTPError,
        ConnectionError,
        NoConnectionError,  # refused, not reached in time, or no address for the name: no ConnectionError of Python's
        TimeoutError,
    )
    return isinstance(error, (*passing, _BrokenBodyError))


def _is_denied(error: Exception) -> bool:
    """Whether the store does not accept the credentials. Of a HEAD request it says only 400 if they have expired."""
    status, code = _response_error(error)
    unexplained = status == 400 and getattr(error, "operation_name", "") == "HeadObject"
    return status in (401, 403) or code in _EXPIRED_CODES or unexplained


def _fail(url: str, error: Exception) -> NoReturn:
    """Raise the StorageError for an error that no retry can cure."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    status, code = _response_error(error)
    if status == 404:
        what = f"bucket {_split(url)[0]!r}" if code == "NoSuchBucket" else "the object"
        raise MissingObjectError(
            f"{url}: {what} does not exist (404); check the URL and storage.endpoint_url"
        ) from error
    if status == 412 and getattr(error, "operation_name", "") == "GetObject":
        _fail_replaced(url)
    if status == 412:
        raise ObjectExistsError(f"{url} exists already and is not overwritten") from error
    if _is_denied(error):
        raise AccessDeniedError(
            f"{url}: access is denied ({status} {code}); check the AWS credentials of this machine "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE or the instance role) and the bucket's policy"
        ) from error
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        raise StorageError(
            f"{url}: no complete AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or run where an instance role exists"
        ) from error
    raise StorageError(f"{url}: {_describe(error)}; check the URL, storage.endpoint_url and storage.region") from error


def _fail_replaced(url: str) -> NoReturn:
    raise StorageError(
        f"{url} was replaced while it was being read; leave the data of a running job alone, and start it again to "
        "read the new ones"
    )


def _describe(error: BaseException) -> str:
    status, code = _response_error(error)
    return f"{status} {code}" if status else f"{type(error).__name__}: {error}"
