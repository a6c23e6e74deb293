"""Connect to tracking stores of MLflow, respect their limits, and explain their errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from m2f.cluster.environment import environment
from m2f.data_pipeline.urls import REMEDY, url_problem
from m2f.model.errors import UserError

METRICS_PER_CALL = 1000
"""Largest number of metrics that MLflow accepts in one call."""
MAX_PARAM_CHARS = 6000
"""Largest number of characters of a parameter that MLflow stores."""
_NOT_ALLOWED = re.compile(r"[^\w\-. /:]", re.ASCII)
_TIMEOUT_VARIABLE, _TIMEOUT_S = "MLFLOW_HTTP_REQUEST_TIMEOUT", "20"
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
"""Error codes of permanent refusals. MLflow also reports failures of its database as BAD_REQUEST."""
_REFUSED_FILES = {400, 413, 414, 415, 422}
"""HTTP status codes of a server or proxy that will never accept a file, for example because it is too large."""
_DELETED = "must be in the 'active' state"
"""Part of MLflow's message that a run or experiment was deleted. It can be restored."""


class TrackingError(UserError):
    """The tracking store cannot be used. The message names its URI, the cause and the remedy."""


def checked_uri(uri: str) -> str:
    """Return the URI of a tracking store unchanged.

    Raises TrackingError if the URI may contain a secret, because URIs are stored and printed.
    """
    if (problem := url_problem(uri)) is not None:
        raise TrackingError(f"the tracking URI {problem}, and would be stored with the run. {REMEDY}")
    return uri


def canonical_uri(uri: str) -> str:
    """Return the URI with an absolute path for a sqlite file, and without a final slash for a server.

    Processes and later starts in other folders then use the same store, and recognize its URI.
    """
    path = uri.removeprefix("sqlite:///")
    if path != uri:
        return f"sqlite:///{os.path.abspath(path)}"
    return uri.rstrip("/") if uri.startswith("http") else uri


def connect(uri: str) -> MlflowClient:
    """Return a client of a tracking store, with short timeouts and little logging.

    Raises TrackingError as `checked_uri` does.
    """
    # By default, MLflow retries a request for minutes and blocks the thread; the journal retries instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault(_TIMEOUT_VARIABLE, _TIMEOUT_S)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs every error that is also raised
    return MlflowClient(tracking_uri=checked_uri(uri))


@contextmanager
def long_requests() -> Iterator[None]:
    """Give requests in the block ten minutes, for uploads of models, unless the user has set another time limit."""
    is_own = os.environ.get(_TIMEOUT_VARIABLE, _TIMEOUT_S) == _TIMEOUT_S
    with environment({_TIMEOUT_VARIABLE: "600"} if is_own else {}):
        yield


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Convert any error of a store, a driver or a proxy in the block to a TrackingError with a remedy."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        cause = brief(error)
        remedy = (
            "Start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or leave both unset for a sqlite file "
            "below `output`"
        )
        if uri.startswith("sqlite") and any(words in cause for words in ("disk is full", "No space left")):
            remedy = "Free some space, or move tracking.uri to another disk"
        elif uri.startswith("sqlite") and any(words in cause for words in ("already exists", "not a database")):
            remedy = "The file is damaged, or incomplete because a process was killed: move it away"
        elif uri.startswith("sqlite") and is_busy(error):
            remedy = "Other processes write to it all the time: stop them, or set tracking.uri to a server"
        elif _DELETED in cause:
            remedy = "Restore it in MLflow, or set tracking.experiment to another name"
        raise TrackingError(f"cannot create or find an MLflow run at {uri}: {cause}. {remedy}") from error


def is_refusal(error: Exception, uri: str) -> bool:
    """Return whether the error is a permanent refusal: by the store itself, or of a file by any server.

    A proxy's 404 page does not count, and neither does a deleted run, because it can be restored.
    """
    if not isinstance(error, MlflowException):  # MLflow does not convert the errors of uploads
        return getattr(getattr(error, "response", None), "status_code", None) in _REFUSED_FILES
    is_from_store = isinstance(error, RestException) or not uri.startswith("http")
    return is_from_store and error.error_code in _REFUSALS and _DELETED not in str(error)


def is_busy(error: Exception) -> bool:
    """Return whether the error means that others wrote to a sqlite file for longer than MLflow waits."""
    return "database is locked" in str(error)


def ui_command(uri: str) -> str:
    """Return how to open the store's UI: the command for a sqlite file, otherwise the URI.

    The path in the command is relative if the file is below the current folder.
    """
    if not uri.startswith("sqlite:///"):
        return uri
    path = uri.removeprefix("sqlite:///")
    below = os.path.relpath(path)
    return f"mlflow ui --backend-store-uri sqlite:///{path if below.startswith('..') else below}"


def shortened(value: str) -> str:
    """Return the value, cut to MAX_PARAM_CHARS with dots at its end; the recipe artifact has the whole text."""
    return value if len(value) <= MAX_PARAM_CHARS else value[: MAX_PARAM_CHARS - 3] + "..."


def text_condition(key: str, text: str) -> str:
    """Return the condition of a search in MLflow that the value of `key` is `text`.

    MLflow cannot quote a text with both kinds of quotes; its condition also accepts other texts, so compare results.
    """
    quote = '"' if "'" in text else "'"
    return f"{key} {'LIKE' if quote in text else '='} {quote}{text.replace(quote, '_')}{quote}"


def store_key(name: str) -> str:
    """Return the name of a metric, tag or parameter with characters that MLflow refuses replaced by `_`."""
    return _NOT_ALLOWED.sub("_", name)


def brief(error: Exception) -> str:
    """Return the error's message in one line of at most 203 characters, or its type without a message."""
    text = " ".join(str(error).partition("[SQL:")[0].split()) or type(error).__name__  # SQLAlchemy appends the SQL
    return text if len(text) <= 200 else text[:200] + "..."
