"""Messages that name the installation extra that provides a missing third-party package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m2f.model.errors import UserError

EXTRA_OF = {
    "boto3": "train",
    "botocore": "train",
    "deepspeed": "train",
    "mlflow": "train",
    "psutil": "train",
    "ray": "train",
    "webdataset": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}
"""Extra by import name."""


class MissingExtraError(UserError):
    """A feature needs a package from an installation extra. The message names the package and the extra."""


def missing_extra(what: str, error: BaseException | None) -> MissingExtraError | None:
    """Return a MissingExtraError if `error` or one of its causes is a missing package of an extra, otherwise None.

    `what` names the feature that needs the package; it is the subject of the message.
    """
    while error is not None:
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in EXTRA_OF:
            return MissingExtraError(
                f"{what} needs {name}, which is not installed: pip install 'm2f[{EXTRA_OF[name]}]'"
            )
        error = error.__cause__
    return None


@contextmanager
def report_missing_extras(what: str) -> Iterator[None]:
    """Context manager that turns a failed import of an extra's package into MissingExtraError.

    `what` names the feature that needs the package. Other import errors pass through unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        known = missing_extra(what, error)
        if known is None:
            raise
        raise known from error
