"""The sqlite file of an MLflow store, which appears only with all its tables.

MLflow makes them in fifty steps, of several seconds. A process that is killed meanwhile, or a second one that starts,
would leave or meet tables that no later start can complete.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

from m2f.data_pipeline.storage.local import rename_new


def make_database(path: Path, connect: Callable[[str], MlflowClient], may_replace: bool) -> None:
    """Make the file where it does not exist, or, if it `may_replace` one, where that holds no run.

    Raises OSError and what MLflow raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and may_replace and not _holds_runs(path):
        path.unlink()
        Path(f"{path}-journal").unlink(missing_ok=True)
    if path.exists():
        return
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        connect(f"sqlite:///{partial}").search_experiments(max_results=1)
        rename_new(partial, path)
    except FileExistsError:  # another run of the same store was faster
        pass
    finally:
        for left in (partial, Path(f"{partial}-journal")):
            left.unlink(missing_ok=True)


def _holds_runs(path: Path) -> bool:
    """Also where that cannot be found out."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0] > 0
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)
    except sqlite3.DatabaseError:
        return True
