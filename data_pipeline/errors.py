"""Errors of data sets, shards and stores."""

from __future__ import annotations

from collections.abc import Iterable

from m2f.model.errors import UserError


class DataError(UserError):
    """A data set, annotation, sample or manifest that cannot be used. Names the file or key and the remedy."""


class LoaderDiedError(DataError):
    """A loader process is gone, which says nothing about the data. Names the usual cause and the remedy."""


class StorageError(UserError):
    """A store or object that cannot be read or written. Names the URL, the cause and the remedy."""


class OutageError(StorageError):
    """A store that answered this run before gave no answer for `storage.patience_s`."""


class AccessDeniedError(StorageError):
    """The store refuses the request to these credentials."""


class MissingObjectError(StorageError):
    """The object, its bucket or its folder does not exist."""


class ObjectExistsError(StorageError):
    """A conditional write found an object in its place and left it alone."""


def some(values: Iterable[object], limit: int = 5) -> str:
    """The first few values for a message."""
    listed = list(values)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(str, listed[:limit])) + more
