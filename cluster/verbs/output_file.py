"""Files that options such as `--output` name. They are checked before the work and written after it."""

from __future__ import annotations

import os
from pathlib import Path

from m2f.model.errors import UserError


def check_output(option: str, path: Path, *, creates_folder: bool) -> None:
    """Check that a file can have the path that an option names.

    `creates_folder` is whether a missing folder will be created. Raises UserError naming option and path.
    """
    if os.path.isdir(path):
        raise UserError(f"{option} {path}: this is a folder; name a file")
    folder = Path(os.path.realpath(path)).parent
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise UserError(f"{option} {path}: {existing} is not a folder; choose another path")
    if existing != folder and not creates_folder:
        raise UserError(f"{option} {path}: the folder does not exist; create it first")


def write_output(option: str, path: Path, content: str | bytes) -> None:
    """Write the file that an option names, and its folder if it is missing. Raises UserError naming option and path."""
    # Names from files may contain surrogates, which UTF-8 does not have.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}; choose another path") from error
