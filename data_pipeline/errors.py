"""Errors of data sets, shards and stores."""

from __future__ import annotations

from collections.abc import Iterable

from m2f.model.errors import UserError


class DataError(UserError):
    """Raised if a data set, annotation, sample or manifest cannot be used.

    The message names the file or key and a remedy.
    """


class LoaderDiedError(DataError):
    """Raised if a loader process died. The data may be fine. The message names the usual cause and a remedy."""


class StorageError(UserError):
    """Raised if a store or object cannot be read or written. The message names the URL, the cause and a remedy."""


class OutageError(StorageError):
    """Raised if a store that answered earlier in this run fails for `storage.patience_s`."""


class AccessDeniedError(StorageError):
    """Raised if the store denies access with the current credentials."""


class MissingObjectError(StorageError):
    """Raised if the object, its bucket or its folder does not exist."""


class ObjectExistsError(StorageError):
    """Raised by a conditional write if the object already exists. The object is not changed."""


def format_list(values: Iterable[object], limit: int = 5) -> str:
    """Return the first `limit` values as text for a message, with the number of further ones."""
    listed = list(values)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(str, listed[:limit])) + more
