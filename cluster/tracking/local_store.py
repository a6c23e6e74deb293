"""The local MLflow store: one sqlite file for all runs of an `output` folder, with their artifacts beside it.

<output>/mlflow.db, <output>/mlartifacts/                  new runs
<output>/<name>/mlflow.db, <output>/<name>/artifacts/      runs with their own store, such as early runs of version 0.1

MLflow stores absolute paths of artifacts, and `tracking.json` stores absolute paths of databases. If a folder was
moved, this module corrects the paths before a process writes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mlflow import MlflowClient

from m2f.cluster.tracking.database import (
    clear_partials,
    database_lock,
    make_database,
    open_database,
    upgrade_database,
)

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
_OWN_ARTIFACTS = "artifacts"
FOLDER_TAG = "m2f.run_folder"
"""Tag of an MLflow run that holds its run folder."""
_SCHEME = "sqlite:///"
_URL_TAG = "m2f.checkpoint.url"
_LOCATIONS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns with locations of artifacts."""
_FOLDER_VALUES = (
    ("tags", "value", f"key = '{FOLDER_TAG}'"),
    ("logged_model_tags", "tag_value", f"tag_key = '{_URL_TAG}'"),
    ("model_version_tags", "value", f"key = '{_URL_TAG}'"),
)
"""Tables, columns and conditions of values that hold locations of run folders and checkpoints."""


def local_database(run_folder: str) -> Path:
    """Return the sqlite file of a run that sets no store: its own file if that holds a run, else that of `output`."""
    own_database, shared_database = _databases(run_folder)
    return own_database if own_database.exists() and _holds_runs(own_database) else shared_database


def is_shared(run_folder: str, database: Path) -> bool:
    """Return whether the database is the shared one of the `output` folder."""
    return database == _databases(run_folder)[1]


def sqlite_uri(database: Path) -> str:
    """Return the URI of the database for MLflow."""
    return f"{_SCHEME}{database}"


def artifact_root(database: Path, shared: bool) -> str:
    """Return the URI of the folder that holds a store's artifacts."""
    return (database.parent / (ARTIFACTS if shared else _OWN_ARTIFACTS)).as_uri()


def prepare(database: Path, shared: bool, connect: Callable[[str], MlflowClient], patience_s: float) -> None:
    """Create the store, or upgrade its schema to the installed MLflow and correct its paths if it was moved.

    Raises TrackingError (see `upgrade_database`), OSError, sqlite3.Error, or any error of MLflow.
    """
    with database_lock(database, patience_s) as is_held:
        if is_held:  # without the lock, partial copies may belong to a running process
            clear_partials(database)
        make_database(database, connect)
        upgrade_database(database, patience_s)
        _relocate(database, artifact_root(database, shared), patience_s)


@dataclass(frozen=True)
class StoredRun:
    """A run, as recorded in its database."""

    folder: str
    """Run folder from the run's tag; "" if it has no tag."""
    is_deleted: bool = False
    """Whether the run was deleted in MLflow, which then accepts no data for it."""


def find_stored(database: Path, run_id: str) -> StoredRun | None:
    """Return a run of a database; None if either does not exist or the file is empty.

    Raises sqlite3.Error if the file is unreadable.
    """
    if not database.exists() or not database.stat().st_size:
        return None
    with closing(open_database(database)) as connection:
        stage = connection.execute("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
        if stage is None:
            return None
        parameters = (run_id, FOLDER_TAG)
        tag = connection.execute("SELECT value FROM tags WHERE run_uuid = ? AND key = ?", parameters).fetchone()
    return StoredRun(tag[0] if tag else "", stage[0] == "deleted")


def is_copy(stored: StoredRun, run_folder: str) -> bool:
    """Return whether `run_folder` is a copy of a run folder beside it, to which the MLflow run belongs."""
    other = stored.folder
    if (
        not other
        or "://" in other
        or _is_same_path(other, run_folder)
        or not _is_same_path(_parent(other), _parent(run_folder))
    ):
        return False
    return Path(other, "tracking.json").exists()


def current_uri(run_folder: str, uri: str, run_id: str) -> str:
    """Return the URI of the store that holds a run.

    The run folder or the whole `output` folder may have been moved since `uri` was recorded. Returns `uri` if no local
    database holds the run.
    """
    if not uri.startswith(_SCHEME) or "://" in run_folder:
        return uri
    for database in _databases(run_folder):
        try:
            if find_stored(database, run_id) is not None:
                return sqlite_uri(database)
        except sqlite3.Error:  # damaged; reported when the database is used
            continue
    return uri


def moved_artifacts(uri: str, artifact_uri: str) -> Path | None:
    """Return the artifact folder of a run whose store was moved; None if the recorded location is correct.

    Readers need this, because only a process that writes corrects the recorded locations.
    """
    if not uri.startswith(_SCHEME):
        return None
    parts = artifact_uri.rsplit("/", 3)
    if len(parts) < 4 or parts[1] not in (ARTIFACTS, _OWN_ARTIFACTS):
        return None
    folder = Path(os.path.abspath(uri.removeprefix(_SCHEME))).parent.joinpath(*parts[1:])
    return folder if folder.is_dir() and not Path(unquote(artifact_uri.removeprefix("file://"))).exists() else None


def _databases(run_folder: str) -> tuple[Path, Path]:
    """Return the run's own database and that of its `output`. Neither needs to exist."""
    return Path(run_folder).resolve() / DATABASE, Path(_parent(run_folder)).resolve() / DATABASE


def _parent(folder: str) -> str:
    return os.path.dirname(os.path.abspath(folder))


def _is_same_path(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _holds_runs(database: Path) -> bool:
    """Return whether the database holds runs; True if it cannot be read.

    Version 0.1 could leave a file without tables when it was killed; such a file contains no runs.
    """
    try:
        with closing(open_database(database)) as connection:
            return connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0] > 0
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)
    except sqlite3.DatabaseError:
        return True


def _relocate(database: Path, root: str, patience_s: float) -> None:
    """If the store was moved, correct all locations below its old folder: artifacts, run folders and checkpoints."""
    with closing(open_database(database, patience_s)) as connection:
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        moved = [old for (old,) in rows if old and old != root and _is_root_of_store(old, root.rpartition("/")[2])]
        if not moved:
            return
        connection.execute("BEGIN IMMEDIATE")
        for old in moved:
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (root, old))
            for table, column in _LOCATIONS:
                _replace_prefix(connection, table, column, f"{old}/", f"{root}/")
            before = unquote(old.removeprefix("file://").rpartition("/")[0])
            for table, column, where in _FOLDER_VALUES:
                _replace_prefix(connection, table, column, f"{before}/", f"{database.parent}/", where)
        connection.execute("COMMIT")


def _is_root_of_store(location: str, name: str) -> bool:
    """Return whether `location` looks like an artifact folder called `name` that this module created for a store."""
    return location.startswith("file:///") and location.endswith(f"/{name}")


def _replace_prefix(
    connection: sqlite3.Connection, table: str, column: str, old: str, new: str, where: str = "1 = 1"
) -> None:
    statement = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ? AND {where}"
    connection.execute(statement, (new, len(old) + 1, len(old), old))
