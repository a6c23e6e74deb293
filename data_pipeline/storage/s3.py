"""Storage in S3 and S3-compatible stores, with boto3.

botocore's retries are disabled, because they do not cover a response body that breaks off. One loop in this module
retries failed requests and broken bodies.
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
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.urls import REMEDY, url_problem
from m2f.model.extras import missing_extra

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_CONTACT_S = 20.0
"""Seconds to retry a store that has never answered. Its endpoint is probably wrong, so longer waits are useless."""
_CONNECT_TIMEOUT_S = 10.0
"""Seconds to wait for a connection. A shorter storage.read_timeout_s takes precedence. The same limit applies to
responses until the store has answered once."""
_WAIT_REPORT_INTERVAL_S = 60.0
"""Seconds between two lines about waiting requests."""
_REACHED_ENDPOINTS: set[str | None] = set()
"""Endpoints that have answered this process. Later failures to answer count as an outage."""
_POOL_CONNECTIONS = 64
"""Connections that are kept open; more than the number of threads of a process that read or write."""
_BACKOFF_BASE_S, _BACKOFF_CAP_S = 0.1, 20.0
"""Failed attempt n, counted from 0, is followed by a random pause of at most min(base x 2^n, cap) seconds."""
_FILE_PART_BYTES = 32 * 1024 * 1024
"""Size of the ranges in which files are read. It limits the bytes that must be read again after a broken body."""
_COPY_PART_BYTES = 1 << 30
"""Size of the parts in which an object is copied inside the store. One request must end within the read timeout, and
some stores copy no parts, so smaller objects are copied by one request."""
_TRANSIENT_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed later. The same holds for the S3 error codes below."""
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError", "ThrottlingException"}
)
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
"""S3 error codes after which the request is repeated with new credentials."""


class _BrokenBodyError(Exception):
    """Raised if a response body ends early, or has another length than requested."""


class S3Store:
    """Store behind one S3 endpoint. A process makes its client on first use and shares it between threads."""

    def __init__(
        self,
        config: StorageConfig,
        known_reachable: bool,
        on_retry: Callable[[], None],
        on_wait: Callable[[str], None],
    ) -> None:
        """Set up the store without connecting to it.

        Args:
            config: settings of the store.
            known_reachable: whether the store has answered before, in this process or another one of this run.
            on_retry: called for each repeated request.
            on_wait: called with a line of text about once a minute while requests wait.
        """
        self._config = config
        if known_reachable:
            _REACHED_ENDPOINTS.add(config.endpoint_url)
        self._on_retry, self._on_wait = on_retry, on_wait
        self._last_report = 0.0
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._client: Any = None
        self._client_key: tuple[int, bool] = (-1, False)

    @contextmanager
    def retry_until(self, stopped: threading.Event) -> Iterator[None]:
        """In this context, stop retrying this thread's requests once `stopped` is set."""
        self._thread.stopped = stopped
        try:
            yield
        finally:
            del self._thread.stopped

    def get(self, url: str) -> bytes:
        """Return the content of an object."""
        return self._with_retries(url, lambda client: _read_body(client.get_object(**_address(url))))

    def get_range(self, url: str, offset: int, length: int, etag: str | None) -> bytes:
        """Return exactly `length` bytes, starting at byte `offset`.

        Raise StorageError if the object's ETag is not `etag`.
        """
        if length == 0:
            return b""
        condition = {} if etag is None else {"IfMatch": etag}

        def request(client: Any) -> bytes:
            response = client.get_object(**_address(url), Range=f"bytes={offset}-{offset + length - 1}", **condition)
            if etag is not None and response.get("ETag", etag) != etag:  # a store that ignores the condition
                _fail_replaced(url)
            _check_range(url, response, offset, length)
            return _read_body(response)

        return self._with_retries(url, request)

    def get_file(self, url: str, path: Path) -> int:
        """Copy an object to `path` and return its size in bytes. After a broken connection, one range is read again."""
        info = self.stat(url)
        with replacing(path) as file:
            for offset in range(0, info.size, _FILE_PART_BYTES):
                file.write(self.get_range(url, offset, min(_FILE_PART_BYTES, info.size - offset), info.etag))
        return info.size

    def stat(self, url: str) -> ObjectInfo:
        """Return size and ETag of an object."""
        response = self._with_retries(url, lambda client: client.head_object(**_address(url)))
        return ObjectInfo(int(response["ContentLength"]), response.get("ETag"))

    def exists(self, url: str) -> bool:
        """Return whether an object exists."""
        try:
            self.stat(url)
        except MissingObjectError:
            return False
        return True

    def put(self, url: str, data: bytes, if_absent: bool) -> None:
        """Write an object. With `if_absent`, raise ObjectExistsError if it already exists."""
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        attempts = 0

        def request(client: Any) -> None:
            nonlocal attempts
            attempts += 1
            client.put_object(**_address(url), Body=data, **condition)

        try:
            self._with_retries(url, request)
        except ObjectExistsError:
            # If only the answer of the first attempt was lost, the retry finds the object that it wrote.
            if attempts == 1 or self.stat(url).size != len(data) or self.get(url) != data:
                raise

    def put_file(self, url: str, path: Path) -> None:
        """Upload a file of any size; large files are uploaded in parts."""
        address = _address(url)
        self._with_retries(url, lambda client: client.upload_file(str(path), address["Bucket"], address["Key"]))

    def copy(self, source: str, url: str) -> None:
        """Copy an object inside the store; if the store refuses, download it and upload it again."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_COPY_PART_BYTES, multipart_chunksize=_COPY_PART_BYTES)
        address = _address(url)
        try:
            self._with_retries(source, lambda client: client.copy(_address(source), **address, Config=config))
        except (MissingObjectError, OutageError):
            raise
        except StorageError as error:
            log.warning("%s is copied through this machine: %s", source, error)
            with ScratchFolder("copy") as folder:
                self.get_file(source, folder / "object")
                self.put_file(url, folder / "object")

    def list(self, prefix: str, follow_links: bool = False) -> tuple[str, ...]:
        """Return the sorted URLs of all objects below a folder. S3 has no links, so `follow_links` has no effect."""
        bucket, folder = _split_folder(prefix)

        def request(client: Any) -> tuple[str, ...]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
            return tuple(sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())))

        return self._with_retries(prefix, request)

    def delete(self, url: str) -> None:
        """Delete an object if it exists. If the store denies deletion, log a warning and keep it."""
        try:
            self._with_retries(url, lambda client: client.delete_object(**_address(url)))
        except AccessDeniedError as error:
            log.warning("not deleted: %s", error)

    def delete_prefix(self, prefix: str) -> None:
        """Delete all objects below a folder. A whole bucket is refused."""
        if not _split_folder(prefix)[1]:
            raise StorageError(f"{prefix}: refusing to delete a whole bucket; name a folder in it")
        for url in self.list(prefix):
            self.delete(url)

    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Return the incomplete multipart uploads below a folder. They cost money, and listings do not show them."""
        bucket, folder = _split_folder(prefix)

        def request(client: Any) -> tuple[UnfinishedWrite, ...]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=folder)
            uploads = [upload for page in pages for upload in page.get("Uploads", ())]
            return tuple(UnfinishedWrite(f"s3://{bucket}/{upload['Key']}", upload["UploadId"]) for upload in uploads)

        return self._with_retries(prefix, request)

    def delete_unfinished(self, write: UnfinishedWrite) -> None:
        """Abort a multipart upload. An upload that has ended is ignored."""
        address = _address(write.url)
        try:
            self._with_retries(
                write.url, lambda client: client.abort_multipart_upload(**address, UploadId=write.upload)
            )
        except MissingObjectError:
            return

    def _with_retries(self, url: str, request: Callable[[Any], T]) -> T:
        """Run a request, and retry it after transient errors.

        Raises:
            OutageError: a store that answered before fails, or valid credentials for it are missing, for longer than
                `storage.patience_s`.
            StorageError: the request cannot succeed, the store has never answered, or the reading was stopped.
        """
        start, credentials_renewed = time.monotonic(), False
        for attempt in itertools.count():
            try:
                client = self._get_client()
                if attempt == 0:  # making a client takes a second, which is not the store's delay
                    start = time.monotonic()
                result = request(client)
                _REACHED_ENDPOINTS.add(self._config.endpoint_url)
                return result
            except StorageError:
                raise
            except Exception as raised:
                error = _unwrap(raised)
                if _is_denied(error) and not credentials_renewed:
                    self._forget_credentials()
                    credentials_renewed = True
                    self._on_retry()
                    continue  # without a pause, because a denial is not an outage
                if lacks_credentials := _lacks_credentials(error):
                    self._forget_credentials()  # a client may never look for other credentials
                if not (_is_transient(error) or (lacks_credentials and self.known_reachable)):
                    if _response_error(error)[0]:
                        _REACHED_ENDPOINTS.add(self._config.endpoint_url)
                    _fail(url, error)
            pause = random.uniform(0, min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2 ** min(attempt, 10)))
            attempt_s = 0.0 if self.known_reachable else self._connect_timeout_s  # longest duration of another attempt
            if time.monotonic() + pause + attempt_s > start + self._patience_s:
                self._give_up(url, error, attempt + 1, time.monotonic() - start)
            self._report_wait(url, error, time.monotonic() - start)
            self._on_retry()
            if self._pause(pause):
                raise StorageError(f"{url}: reading was stopped while waiting for the store") from error
        raise AssertionError("unreachable: the loop has no end")

    @property
    def known_reachable(self) -> bool:
        """Return whether the store has answered this process or the process that started it."""
        return self._config.endpoint_url in _REACHED_ENDPOINTS

    @property
    def _patience_s(self) -> float:
        return self._config.patience_s if self.known_reachable else min(FIRST_CONTACT_S, self._config.patience_s)

    @property
    def _connect_timeout_s(self) -> float:
        return min(_CONNECT_TIMEOUT_S, self._config.read_timeout_s)

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt. Return True, without further waiting, if this thread's reading was stopped."""
        stopped: threading.Event = getattr(self._thread, "stopped", None) or threading.Event()
        return stopped.wait(seconds)

    def _give_up(self, url: str, error: Exception, attempts: int, seconds: float) -> NoReturn:
        summary = f"{attempts} attempts in {seconds:.0f} s, the last failed with {_describe(error)}"
        if not self.known_reachable:
            raise StorageError(
                f"{url}: the store does not answer ({summary}); check storage.endpoint_url and the network"
            ) from error
        problem, remedy = "the store has not answered", "Restart the run when the store is available again"
        if _lacks_credentials(error):
            problem, remedy = "valid AWS credentials have been missing", "Renew the credentials and restart the run"
        raise OutageError(
            f"{url}: {problem} for longer than storage.patience_s ({self._config.patience_s:g} s; {summary}). {remedy}"
        ) from error

    def _report_wait(self, url: str, error: Exception, seconds: float) -> None:
        """Report a waiting request, at most once a minute for all threads."""
        now = time.monotonic()
        if seconds >= _WAIT_REPORT_INTERVAL_S and now - self._last_report >= _WAIT_REPORT_INTERVAL_S:
            self._last_report = now
            self._on_wait(
                f"waiting for the storage: {url} has failed for {seconds:.0f} s ({_describe(error)}); "
                f"storage.patience_s is {self._config.patience_s:g} s"
            )

    def _get_client(self) -> Any:
        """Return the client of this process.

        A client inherited by a fork is replaced. After the first answer, another client with a longer timeout is used.
        """
        key = (os.getpid(), self.known_reachable)
        with self._lock:
            if self._client is None or self._client_key != key:
                read_timeout_s = self._config.read_timeout_s if self.known_reachable else self._connect_timeout_s
                self._client = _make_client(self._config, self._connect_timeout_s, read_timeout_s)
                self._client_key = key
            return self._client

    def _forget_credentials(self) -> None:
        """Discard the client. The next one looks up the credentials again, because they may have expired."""
        with self._lock:
            self._client = None


def _make_client(config: StorageConfig, connect_timeout_s: float, read_timeout_s: float) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise StorageError(str(missing_extra("S3 storage", error) or error)) from error
    if (problem := url_problem(_endpoint(config) or "")) is not None:
        raise StorageError(f"the S3 endpoint in AWS_ENDPOINT_URL {problem}, and would be printed. {REMEDY}")
    options = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=_POOL_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={"addressing_style": "path" if _endpoint(config) else "auto"},
    )
    # A separate session, because creating boto3's default session is not thread-safe.
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=config.endpoint_url, region_name=config.region, config=options)


def _endpoint(config: StorageConfig) -> str | None:
    return config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def split_url(url: str) -> tuple[str, str]:
    """Return the bucket and the key of a URL. Raises StorageError if it has no bucket."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{url}: the bucket is missing; write s3://bucket/key")
    return bucket, key


def _split_folder(url: str) -> tuple[str, str]:
    bucket, key = split_url(url)
    return bucket, f"{key.strip('/')}/" if key.strip("/") else ""


def _address(url: str) -> dict[str, str]:
    bucket, key = split_url(url)
    if not key:
        raise StorageError(f"{url}: the object key is missing; write s3://bucket/key")
    return {"Bucket": bucket, "Key": key}


def _read_body(response: Any) -> bytes:
    data = response["Body"].read()
    if len(data) != response["ContentLength"]:
        raise _BrokenBodyError(f"{len(data)} of {response['ContentLength']} bytes arrived")
    return data


def _check_range(url: str, response: Any, offset: int, length: int) -> None:
    """Check the range of a response. If the object is too short, raise StorageError, since a retry cannot succeed."""
    total = re.search(r"/(\d+)$", response.get("ContentRange", ""))
    if total and offset + length > int(total[1]):
        raise StorageError(
            f"{url}: {length} bytes were requested at offset {offset}, but the object has {total[1]} bytes; "
            "it was truncated or replaced"
        )
    if response["ContentLength"] != length:
        raise _BrokenBodyError(f"the store announced {response['ContentLength']} bytes instead of {length}")


def _response_error(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and S3 error code; (0, "") for errors without a response."""
    response = getattr(error, "response", None) or {}  # None on botocore's streaming errors
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _unwrap(error: Exception) -> Exception:
    """Return the error inside boto3's wrapper for failed uploads; other errors unchanged."""
    from boto3.exceptions import S3UploadFailedError

    wrapped = error.__context__ if isinstance(error, S3UploadFailedError) else None
    return wrapped if isinstance(wrapped, Exception) else error


def _is_transient(error: Exception) -> bool:
    """Return whether an error is transient, so that the same request may succeed later."""
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
    transient = (
        FlexibleChecksumError,
        HTTPClientError,
        ResponseStreamingError,
        HTTPError,
        ConnectionError,
        NoConnectionError,  # refused, timed out or unresolved; not a subclass of Python's ConnectionError
        TimeoutError,
    )
    return isinstance(error, (*transient, _BrokenBodyError))


def _lacks_credentials(error: Exception) -> bool:
    """Return whether credentials were not found or have expired, so that later ones may be valid.

    The metadata service of a machine may have been too busy to answer, or a file of credentials is rewritten late.
    """
    from botocore.exceptions import CredentialRetrievalError, MetadataRetrievalError, NoCredentialsError

    missing = (CredentialRetrievalError, MetadataRetrievalError, NoCredentialsError)
    return isinstance(error, missing) or _have_expired(error)


def _have_expired(error: Exception) -> bool:
    """Return whether the store says that the credentials have expired. It answers HEAD with a plain status 400."""
    status, code = _response_error(error)
    return code in _EXPIRED_CODES or (status == 400 and getattr(error, "operation_name", "") == "HeadObject")


def _is_denied(error: Exception) -> bool:
    """Return whether the store rejects the credentials."""
    return _response_error(error)[0] in (401, 403) or _have_expired(error)


def _fail(url: str, error: Exception) -> NoReturn:
    """Raise the StorageError for an error that a retry cannot fix."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    status, code = _response_error(error)
    if status == 404:
        missing = f"bucket {split_url(url)[0]!r}" if code == "NoSuchBucket" else "the object"
        raise MissingObjectError(
            f"{url}: {missing} does not exist (404); check the URL and storage.endpoint_url"
        ) from error
    if status == 412 and getattr(error, "operation_name", "") == "GetObject":
        _fail_replaced(url)
    if status == 412:
        raise ObjectExistsError(f"{url} already exists and is not overwritten") from error
    if _is_denied(error):
        raise AccessDeniedError(
            f"{url}: access is denied ({status} {code}); check the AWS credentials of this machine "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE or the instance role) and the bucket's policy"
        ) from error
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        raise StorageError(
            f"{url}: no complete AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or run on a machine with an instance role"
        ) from error
    raise StorageError(f"{url}: {_describe(error)}; check the URL, storage.endpoint_url and storage.region") from error


def _fail_replaced(url: str) -> NoReturn:
    raise StorageError(
        f"{url} was replaced while it was being read; do not change the data of a running job, and restart the job to "
        "read the new data"
    )


def _describe(error: BaseException) -> str:
    status, code = _response_error(error)
    return f"{status} {code}" if status else f"{type(error).__name__}: {error}"
