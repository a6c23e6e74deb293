"""Call a tracking server with retries: briefly before its first answer, for `storage.patience_s` afterwards."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from mlflow.exceptions import MlflowException

from m2f.cluster.environment import environment
from m2f.cluster.tracking.store import TrackingError, brief, is_busy
from m2f.data_pipeline.errors import OutageError

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)
FIRST_CONTACT_S = 20.0
"""Seconds to retry before the first answer. A server that never answers counts as a wrong address, not as an outage."""
_FIRST_REQUEST_S = 10.0
"""Timeout in seconds of requests before the first answer. FIRST_CONTACT_S has room for only one that times out."""
_FIRST_CONTACT_ENV = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": f"{_FIRST_REQUEST_S:.0f}"}
"""Environment variables of MLflow for the first contact. MLflow reads them at every request."""
_WARNING_INTERVAL_S = 60.0
"""Seconds between two lines about a store that does not answer."""
_MAX_PAUSE_S = 20.0
"""Longest pause in seconds between two calls; pauses double from 0.5 s. A call resumes at most this late."""


class TrackingOutageError(TrackingError, OutageError):
    """A server that had answered before has not answered for `storage.patience_s`."""


class StoreRetrier:
    """Calls one store from one process, with retries. A sqlite file is retried only while others write to it."""

    def __init__(self, uri: str, patience_s: float) -> None:
        self._uri, self._patience_s = uri, patience_s
        self._answered = False
        self._warned_at = float("-inf")

    def ask(self, call: Callable[[], T]) -> T:
        """Return the result of `call`, repeating it while the server does not answer. The call must be idempotent.

        Raises:
            TrackingOutageError: the server has answered before, but not for the last `storage.patience_s` seconds.
            Exception: the error of `call`, if it is not an outage or if the server has never answered.
        """
        started_at = time.monotonic()
        for attempt in itertools.count():
            try:
                with environment({} if self._answered else _FIRST_CONTACT_ENV):
                    result = call()
            except Exception as error:
                is_file = not self._uri.startswith("http")
                if not (is_busy(error) if is_file else _is_outage(error)):
                    raise
                self._answered = self._answered or is_file
                pause = min(_MAX_PAUSE_S, 0.5 * 2.0**attempt)
                self._wait(error, pause, time.monotonic() - started_at)
            else:
                self._answered = True
                return result
        raise AssertionError("unreachable: the loop has no end")

    def _wait(self, error: Exception, pause: float, waited: float) -> None:
        """Sleep before the next call; raise if the time is up."""
        if not self._answered and waited + pause + _FIRST_REQUEST_S > min(FIRST_CONTACT_S, self._patience_s):
            raise error
        if self._answered and waited + pause > self._patience_s:
            remedy = "Start the run again when the server is back"
            if is_busy(error):
                remedy = "Other processes write to it all the time: stop them, or set tracking.uri to a server"
            raise TrackingOutageError(
                f"{self._uri} has not responded for longer than storage.patience_s ({self._patience_s:g} s; last "
                f"error: {brief(error)}). {remedy}"
            ) from error
        if time.monotonic() - self._warned_at > _WARNING_INTERVAL_S:
            self._warned_at = time.monotonic()
            LOGGER.warning(f"tracking: waiting for {self._uri} ({brief(error)})")
        time.sleep(pause)


def _is_outage(error: Exception) -> bool:
    """Return whether the server or the network fails. MLflow reports a failed connection as status 500."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:
        status = getattr(getattr(error, "response", None), "status_code", 500 if isinstance(error, OSError) else 0)
    return status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS
