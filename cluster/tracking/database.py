"""Create the sqlite file of an MLflow store atomically, and upgrade it to the schema of the installed MLflow.

MLflow creates and upgrades its tables in about fifty steps that take several seconds. If a process is killed during
this time, it leaves tables that MLflow cannot complete later, and a second process may read them. Therefore both happen
in a copy, under a lock. The file uses sqlite's rollback journal, because a write-ahead log does not work on network
file systems, and is lost if a user copies only the file. MLflow itself waits 20 s for other writers.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import mlflow.db
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from mlflow import MlflowClient

from m2f.cluster.tracking.store import TrackingError, brief
from m2f.data_pipeline.storage.local import rename_new

LOGGER = logging.getLogger(__name__)
_MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations"
_LOCKS_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors of `flock` on a file system without locks. Creation and upgrades are safe even without a lock."""
_POLL_S = 0.1
"""Pause in seconds between two attempts to take the lock, because `flock` itself has no time limit."""
_WARNING_DELAY_S = 5.0
"""Seconds of waiting until a warning. Another process usually needs less to create the tables."""


@contextmanager
def database_lock(path: Path, patience_s: float) -> Iterator[bool]:
    """Hold an exclusive lock on `path`.lock among the processes of this machine. It is released if its holder dies.

    Yields True if the lock is held, False on a file system without locks. Raises TrackingError after `patience_s`
    seconds, OSError if the file cannot be created.
    """
    lock = path.with_name(f"{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    started_at, warned = time.monotonic(), False
    with lock.open("ab") as file:
        while (is_held := _try_lock(file.fileno())) is False:
            waited = time.monotonic() - started_at
            if waited > patience_s:
                raise TrackingError(
                    f"{path}: another process has held {lock} for longer than storage.patience_s ({patience_s:g} s) "
                    "while preparing this MLflow store. Stop that process and start again"
                )
            if waited > _WARNING_DELAY_S and not warned:
                warned = True
                LOGGER.warning(f"tracking: waiting for another process that is preparing {path}")
            time.sleep(_POLL_S)
        yield is_held is True


def make_database(path: Path, connect: Callable[[str], MlflowClient]) -> None:
    """Create the file if it does not exist or is empty. Raises OSError, or any error of MLflow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        return
    path.unlink(missing_ok=True)
    partial = _partial(path)
    try:
        connect(f"sqlite:///{partial}").search_experiments(max_results=1)
        rename_new(partial, path)
    except FileExistsError:  # another run created the store first
        pass
    finally:
        _delete(partial)


def clear_partials(path: Path) -> None:
    """Delete partial copies of the file that killed processes have left. Call this while holding the lock."""
    for partial in path.parent.glob(f".partial-*-{path.name}*"):
        partial.unlink(missing_ok=True)


def upgrade_database(path: Path, patience_s: float) -> None:
    """Upgrade the tables to the schema of the installed MLflow if they have an older one.

    Call this while holding the lock. A copy of the old file is kept beside it as NAME.before-REVISION. If the process
    is killed, the file is unchanged.

    Raises:
        TrackingError: a newer MLflow wrote the file, or its tables cannot be upgraded.
        OSError, sqlite3.Error: the file cannot be read, or the disk has no space for copies.
    """
    uri, old, new = f"sqlite:///{path}", _revision(path), _newest_revision()
    if old in (new, ""):
        return
    if not _is_known(old):
        raise TrackingError(_newer_schema_message(path, old))
    backup, partial = path.with_name(f"{path.name}.before-{new}"), _partial(path)
    LOGGER.warning(f"tracking: upgrading {path} to the schema of MLflow {mlflow.__version__}; backup: {backup.name}")
    try:
        with closing(open_database(path, patience_s)) as database, closing(open_database(path, patience_s)) as reader:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")  # held beyond ROLLBACK, until the copy is back
            database.execute("BEGIN IMMEDIATE")  # keeps other writers out
            _copy(reader, partial)
            os.replace(partial, backup)
            _copy(reader, partial)
            _upgrade(partial, uri)
            database.execute("ROLLBACK")
            with closing(open_database(partial, patience_s)) as upgraded:
                upgraded.backup(database, progress=_refuse_busy)  # atomic: one transaction
    finally:
        _delete(partial)


def schema_problem(path: Path) -> str | None:
    """Return why the installed MLflow cannot use the file without an upgrade.

    Returns None if MLflow can use it, or if the file is damaged, which MLflow reports itself.
    """
    try:
        found = _revision(path)
    except sqlite3.Error:
        return None
    if found in (_newest_revision(), ""):
        return None
    if not _is_known(found):
        return _newer_schema_message(path, found)
    return (
        f"sqlite:///{path}: its tables are from an older MLflow. The next run that uses it upgrades it; or copy the "
        f"file and run `mlflow db upgrade sqlite:///{path}`"
    )


def _newer_schema_message(path: Path, revision: str) -> str:
    return (
        f"sqlite:///{path}: its tables are from a newer MLflow (schema {revision}; the installed MLflow "
        f"{mlflow.__version__} has {_newest_revision()}). Install that MLflow, or set tracking.uri to another store"
    )


def _upgrade(partial: Path, uri: str) -> None:
    try:
        mlflow.db.commands(["upgrade", f"sqlite:///{partial}"], standalone_mode=False)
    except Exception as error:
        raise TrackingError(
            f"{uri}: cannot upgrade its tables to the schema of MLflow {mlflow.__version__} ({brief(error)}). Copy the "
            f"file and try `mlflow db upgrade {uri}`"
        ) from error


def _refuse_busy(status: int, remaining: int, total: int) -> None:
    """Raise OperationalError if a step of a backup failed. The connection has already waited for the lock.

    Without this callback, `backup` would retry forever.
    """
    if status not in (sqlite3.SQLITE_OK, sqlite3.SQLITE_DONE):
        raise sqlite3.OperationalError("database is locked")


def _try_lock(descriptor: int) -> bool | None:
    """Try to take the lock and return whether this process holds it; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
        return None
    return True


def _partial(path: Path) -> Path:
    return path.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _delete(partial: Path) -> None:
    for file in (partial, Path(f"{partial}-journal")):
        file.unlink(missing_ok=True)


def open_database(path: Path, patience_s: float = 20.0) -> sqlite3.Connection:
    """Open an existing file in autocommit mode; statements wait up to `patience_s` seconds for other writers.

    The file is opened for writing even by readers, so that the transaction of a killed writer is rolled back.
    Raises sqlite3.Error.
    """
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=patience_s, isolation_level=None)


def _copy(source: sqlite3.Connection, target: Path) -> None:
    with closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def _revision(path: Path) -> str:
    """Return the revision of the schema; "" if there is none, as in a file that MLflow did not create."""
    with closing(open_database(path)) as database:
        has_one = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        found = database.execute("SELECT version_num FROM alembic_version").fetchone() if has_one else None
    return found[0] if found else ""


@lru_cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_MIGRATIONS))  # cached, because computing it reads seventy files


def _newest_revision() -> str:
    return _scripts().get_current_head() or ""


def _is_known(revision: str) -> bool:
    try:
        return _scripts().get_revision(revision) is not None
    except CommandError:
        return False
