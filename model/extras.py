"""Which extra of the package brings a third-party package that the base installation lacks."""

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
"""By the name that is imported."""


class MissingExtraError(UserError):
    """Something needs a package that an extra of the installation brings. Names both."""


def missing_extra(what: str, error: BaseException | None) -> MissingExtraError | None:
    """The error to show where `error`, or what caused it, says that a package of an extra is not installed."""
    while error is not None:
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in EXTRA_OF:
            return MissingExtraError(
                f"{what} needs {name}, which is not installed: pip install 'm2f[{EXTRA_OF[name]}]'"
            )
        error = error.__cause__
    return None


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Within it, the import of a package that an extra brings raises MissingExtraError: `what` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        known = missing_extra(what, error)
        if known is None:
            raise
        raise known from error
